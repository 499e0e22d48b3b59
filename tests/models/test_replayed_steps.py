"""Decoding steps that are recorded and replayed give what the same steps give when called."""

from pathlib import Path

import pytest
import torch
from tests.models.twins import CONFIGS, SLOT_TOKENS, load_engine, random_ids, save_checkpoint

from tgis.engines.base import CacheShape
from tgis.engines.native import NativeEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models import kernels
from tgis.models.kernels import replay

LENGTHS = (5, 17, 1, 30)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step that is replayed."""
    if kernels.amx_linear(0, 64, 64, None, None, torch.bfloat16, torch.bfloat16) is None:
        pytest.skip("few rows of a linear layer are ours only on AMX")
    count: list[int] = []
    run = replay._Recorded.run

    def counting(recorded: replay._Recorded, inputs: tuple[torch.Tensor | None, ...]) -> object:
        count.append(1)
        return run(recorded, inputs)

    monkeypatch.setattr(replay._Recorded, "run", counting)
    return count


def prefilled(path: Path) -> NativeEngine:
    engine = load_engine(path, torch.bfloat16)
    rows = [Row(i, i, random_ids(i, n), 0, Want.LAST) for i, n in enumerate(LENGTHS)]
    engine.forward(StepPlan(rows))
    return engine


def decoding(slots: list[int], step: int) -> StepPlan:
    return StepPlan(
        [Row(s, s, random_ids(100 + step + s, 1), LENGTHS[s] + step, Want.LAST) for s in slots]
    )


def test_replayed_steps_equal_called_ones(tmp_path: Path, counted: list[int]) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama-aligned"])
    engine, twin = prefilled(tmp_path), prefilled(tmp_path)
    plain, cache = twin._decoder, twin._cache
    assert cache is not None
    twin._step = lambda inputs, splices: plain.forward(inputs, cache, splices)
    for step in range(12):
        # the company changes, and so does everybody's place in it
        slots = [s for s in (2, 0, 3, 1) if (step + s) % 3]
        plan = decoding(slots, step)
        assert torch.equal(engine.forward(plan), twin.forward(plan))
    assert len(counted) >= 8


def test_a_prompt_beside_decoding_is_not_recorded(tmp_path: Path, counted: list[int]) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama-aligned"])
    engine = prefilled(tmp_path)
    for step in range(3):
        prompt = Row(9, 4, random_ids(7, 9), 9 * step, Want.LAST)
        engine.forward(StepPlan([*decoding([0, 1], step).rows, prompt]))
    assert not counted


def test_a_new_cache_is_recorded_anew(tmp_path: Path, counted: list[int]) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama-aligned"])
    engine = prefilled(tmp_path)
    plans = [decoding([0, 1], step) for step in range(4)]
    first = [engine.forward(plan).clone() for plan in plans]
    engine.allocate(CacheShape(6, SLOT_TOKENS))
    rows = [Row(i, i, random_ids(i, n), 0, Want.LAST) for i, n in enumerate(LENGTHS)]
    engine.forward(StepPlan(rows))
    for plan, expected in zip(plans, first, strict=True):
        assert torch.equal(engine.forward(plan), expected)
    assert len(counted) == 6
