"""On the card: captured steps, sampling, memory, and that a step waits for nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.models.twins import CONFIGS, random_ids, save_checkpoint
from tests.sampling.test_device import EOS, details_for, logits_of, same, states_of

from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.meters import CudaMeter
from tgis.engines.placement import Placement
from tgis.engines.plan import Row, StepPlan, Want
from tgis.sampling.sampler import choose_on_device

CARD = torch.device("cuda", 0)
LENGTHS = (5, 20, 1, 31, 16)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the card raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def engine_of(path: Path, max_running: int) -> native.NativeEngine:
    import json

    config = json.loads((path / "config.json").read_text())
    placement = Placement(CARD, "blocks")
    engine = native.load(path, config, torch.bfloat16, placement=placement)
    engine.allocate(CacheShape(20, engine.caps.kv_granule, 64, max_running))
    rows = [Row(s, s, random_ids(s, n), 0, Want.LAST, [s]) for s, n in enumerate(LENGTHS)]
    engine.forward(StepPlan(rows))
    return engine


def decoding(slots: list[int], step: int) -> StepPlan:
    tokens = {slot: random_ids(9 + slot + step, 1) for slot in slots}
    rows = [Row(s, s, tokens[s], LENGTHS[s] + step, Want.LAST, [s]) for s in slots]
    return StepPlan(rows)


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom"])
def test_captured_steps_equal_called_ones(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, CONFIGS[name])
    graphs, plain = engine_of(tmp_path, 6), engine_of(tmp_path, 0)
    assert graphs._graphs is not None
    for step in range(9):
        slots = [s for s in (2, 0, 3, 1, 4) if (step + s) % 3]
        expected = plain.forward(decoding(slots, step))
        found = graphs.forward(decoding(slots, step))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_a_step_waits_for_nothing(tmp_path: Path, no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    save_checkpoint(tmp_path, CONFIGS["llama"])
    engine = engine_of(tmp_path, 6)
    torch.cuda.set_sync_debug_mode("error")
    for step in range(3):
        engine.forward(decoding([0, 1, 2], step))


def test_the_card_chooses_what_the_host_would() -> None:
    """From the same noise, which is a hash: the same on every device."""
    for step in range(5):
        states = states_of(details_for(step))
        expected = choose_on_device(states, logits_of(step), EOS)
        for _ in range(2):
            found = choose_on_device(states, logits_of(step).to(CARD), EOS)
            for one, other in zip(found, expected, strict=True):
                assert one.token_id == other.token_id
                same(one.details, other.details)


def test_memory_is_metered() -> None:
    meter = CudaMeter(0.5)
    size = 64 << 20
    assert meter.peak(lambda: torch.empty(size, dtype=torch.uint8, device=CARD)) >= size
    total = torch.cuda.get_device_properties(CARD).total_memory
    assert 0 < meter.available() <= total // 2
