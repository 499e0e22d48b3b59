"""PT2_COMPILE: which steps prove compiled code, and what becomes of it when they do not."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kit.fake_engine import FakeEngine

from tgis.clib import BuildError
from tgis.engines.base import EngineCaps, KvLayout
from tgis.engines.compilation import Bounds, Compilations, compile_network, warm_up
from tgis.engines.plan import StepPlan, Want
from tgis.types import Compilation, ModelKind

BOUNDS = Bounds(max_running=4, max_step_tokens=16, max_sequence_length=64, kv_tokens=256)


class Compiles:
    """An engine that deviates from itself when it is compiled."""

    def __init__(self, deviation: float = 0.0, layout: KvLayout = "rows", error: str = "") -> None:
        self.caps = EngineCaps(
            "tgis_native",
            ModelKind.DECODER_ONLY,
            layout,
            True,
            32,
            None,
            8,
            "float32",
        )
        self.compiled = False
        self.released: list[int] = []
        self.plans: list[StepPlan] = []
        self._deviation = deviation
        self._error = error

    def compile(self, directory: Path) -> bool:
        if self._error:
            raise BuildError(self._error)
        self.compiled = True
        return True

    def uncompile(self) -> None:
        self.compiled = False

    def deviation(self, plan: StepPlan) -> float:
        self.plans.append(plan)
        return self._deviation

    def release(self, slots: list[int]) -> None:
        self.released += slots


def run(engine: object, num_shard: int = 1) -> Compilation:
    return compile_network(engine, "/nowhere", BOUNDS, num_shard)  # type: ignore[arg-type]


def test_compiled_code_that_is_right(caplog: pytest.LogCaptureFixture) -> None:
    engine = Compiles()
    with caplog.at_level("INFO"):
        result = run(engine)
    assert (result.active, result.num_compiled, engine.compiled) == (True, 1, True)
    assert caplog.messages[0] == "Warming up PyTorch 2 compile..."
    assert caplog.messages[1] == "Time spent during compile warmup: 0.0 minutes"
    used = [row.slot for plan in engine.plans for row in plan.rows]
    assert engine.released == used


@pytest.mark.parametrize(
    ("engine", "num_shard", "reason"),
    [
        (Compiles(0.01), 1, "compiled code is wrong: logits deviate by 1.00%"),
        (Compiles(float("nan")), 1, "compiled code is wrong: logits deviate by nan%"),
        (Compiles(error="no C++ compiler"), 1, "no C++ compiler"),
        (Compiles(layout="blocks"), 1, "nothing is compiled for the blocks layout of the cache"),
        (Compiles(), 2, "a model split among 2 processes is not compiled"),
        (FakeEngine(), 1, "engine fake does not compile decoder-only models"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_warning_and_uncompiled(
    engine: object, num_shard: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(engine, num_shard)
    assert not result.active
    assert not getattr(engine, "compiled", False)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"PT2_COMPILE: {reason}; the model is served uncompiled"]


@given(
    max_running=st.integers(1, 64),
    max_step_tokens=st.integers(1, 300),
    length=st.integers(1, 200),
    more_tokens=st.integers(0, 5000),
    granule=st.sampled_from([1, 16, 42]),
)
def test_warm_up_stays_within_the_bounds(
    max_running: int, max_step_tokens: int, length: int, more_tokens: int, granule: int
) -> None:
    step_tokens = max(max_step_tokens, max_running)  # as the pool has it
    whole = -(-length // granule) * granule
    bounds = Bounds(max_running, step_tokens, length, whole + more_tokens)
    plans = list(warm_up(bounds, granule, 32))
    for plan in plans:
        assert 1 <= len(plan.rows) <= max_running
        assert plan.num_tokens <= step_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        committed = 0
        for row in plan.rows:
            end = row.start + len(row.token_ids)
            assert 0 <= row.start < end <= length
            committed += -(-end // granule) - row.start // granule
        assert len(plan.rows) == 1 or committed * granule <= bounds.kv_tokens
    assert max(len(plan.rows[0].token_ids) for plan in plans) == min(step_tokens, length)
    assert {row.want for plan in plans for row in plan.rows} == set(Want)


def test_warm_up_is_the_same_every_time() -> None:
    assert list(warm_up(BOUNDS, 16, 32)) == list(warm_up(BOUNDS, 16, 32))


def test_what_pytorch_compiles_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils", raising=False)
    compilations = Compilations()
    assert compilations.drain() == 0
    counters = {"stats": {"unique_graphs": 2}}
    utils = SimpleNamespace(counters=counters)
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", utils)
    assert [compilations.drain(), compilations.drain()] == [2, 0]
    counters["stats"]["unique_graphs"] += 1
    assert compilations.drain() == 1
