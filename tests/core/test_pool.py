"""Which strategies an engine gets."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
from tests.kit.fake_engine import FakeEngine

from tgis.config import Config
from tgis.core.budget import PaddedBudget, PagedBudget
from tgis.core.kv.blocks import BlocksMemory
from tgis.core.kv.rows import RowsMemory
from tgis.core.pool import Pool, make_pool
from tgis.engines.base import CacheShape
from tgis.errors import ConfigError

LENGTH = 256


def pool_of(
    layout: Literal["rows", "blocks", "padded"], block_tokens: int = 0, **settings: object
) -> tuple[Pool, FakeEngine]:
    engine = FakeEngine(kv_layout=layout, block_tokens=block_tokens)
    config = Config(kv_cache_memory=10**6, **settings)  # type: ignore[arg-type]
    return make_pool(engine, config, LENGTH), engine


def test_rows_have_spare_ones_for_the_cache() -> None:
    pool, engine = pool_of("rows", max_batch_size=8)
    assert engine.shape == CacheShape(16, LENGTH)
    assert isinstance(pool.memory, RowsMemory)
    assert pool.memory.caching
    assert pool.memory.total == 16 * (LENGTH + 1)
    assert isinstance(pool.budget, PagedBudget)
    assert (pool.max_running, pool.max_step_tokens) == (8, 512)


def test_prefix_caching_can_be_turned_off() -> None:
    assert not pool_of("rows", prefix_caching=False)[0].memory.caching


def test_blocks_fill_the_pool() -> None:
    pool, engine = pool_of("blocks", block_tokens=16, max_batch_size=8)
    assert isinstance(pool.memory, BlocksMemory)
    assert engine.shape == CacheShape(pool.memory.total // 16, 16, LENGTH, pool.max_running)


class FakeMeter:
    """A card of 100,000 bytes that are free; says how it was used."""

    def __init__(self, step_bytes: int) -> None:
        self.step_bytes = step_bytes
        self.fractions: list[float] = []

    def of(self, device: str, fraction: float) -> "FakeMeter":
        assert device == "cuda"
        self.fractions.append(fraction)
        return self

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return self.step_bytes

    def available(self) -> int:
        return 100_000


@pytest.mark.parametrize(("margin", "step_bytes"), [(0, 0), (20, 0), (20, 30_000), (99, 0)])
def test_a_card_is_measured_by_its_largest_step(
    monkeypatch: pytest.MonkeyPatch, margin: int, step_bytes: int
) -> None:
    meter = FakeMeter(step_bytes)
    monkeypatch.setattr("tgis.core.pool.meter_of", meter.of)
    engine = FakeEngine(kv_layout="blocks", block_tokens=16)
    engine.caps = replace(engine.caps, device="cuda")
    settings = {"batch_safety_margin": margin, "cuda_process_memory_fraction": 0.7}
    pool = make_pool(engine, Config(max_batch_size=300, **settings), LENGTH)  # type: ignore[arg-type]
    (plan,) = engine.plans
    assert plan.num_tokens == plan.num_logits == pool.max_step_tokens == 600
    assert [row.start + len(row.token_ids) for row in plan.rows] == [LENGTH] * 3
    assert meter.fractions == [0.7]
    room = int((100_000 - step_bytes) * (1 - margin / 100))
    assert pool.memory.total == room // 16 * 16
    assert engine.shape == CacheShape(pool.memory.total // 16, 16, LENGTH, pool.max_running)


def test_a_card_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgis.core.pool.meter_of", FakeMeter(99_900).of)
    engine = FakeEngine(kv_layout="blocks", block_tokens=16)
    engine.caps = replace(engine.caps, device="cuda")
    with pytest.raises(ConfigError, match="--max-sequence-length 256: its keys and values need"):
        make_pool(engine, Config(), LENGTH)


def test_padded_engines_get_tgis_defaults_and_whole_prompts() -> None:
    pool, _ = pool_of("padded")
    assert isinstance(pool.budget, PaddedBudget)
    assert not pool.memory.caching
    assert pool.max_running == 12
    assert pool.max_step_tokens >= 12 * LENGTH
    assert (pool.budget.max_prefill_padding, pool.budget.max_waiting_tokens) == (0.2, 24)


@pytest.mark.parametrize(
    ("mode", "margin", "limit"),
    [
        ("off", 20, float("inf")),
        ("manual", 20, 12 * LENGTH * 80 // 100),
        ("manual", 0, 12 * LENGTH),
        ("auto", 20, 12 * LENGTH * 80 // 100),  # the pool fits 12 sequences of full length
    ],
)
def test_estimate_memory(mode: str, margin: int, limit: float) -> None:
    pool, _ = pool_of("padded", estimate_memory=mode, batch_safety_margin=margin)
    assert isinstance(pool.budget, PaddedBudget)
    assert pool.budget.model.limit == limit
    assert pool.memory.total == min(limit, 12 * LENGTH)


def test_a_length_that_does_not_fit_is_refused() -> None:
    engine = FakeEngine()
    with pytest.raises(ConfigError, match="--max-sequence-length 2000000"):
        make_pool(engine, Config(kv_cache_memory=10**6), 2_000_000)


@pytest.mark.parametrize("layout", ["rows", "blocks"])
def test_a_step_has_more_tokens_than_a_batch_has_sequences(
    layout: Literal["rows", "blocks"],
) -> None:
    with pytest.raises(ConfigError, match="MAX_STEP_TOKENS = 8: must exceed the 8 sequences"):
        pool_of(layout, block_tokens=16, max_batch_size=8, max_step_tokens=8)
