"""Captured decoding steps, with a stand-in that computes anew what CUDA would replay."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.attention.test_blocks import eager_flex
from tests.models.twins import CONFIGS, random_ids, save_checkpoint
from torch import Tensor

from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.graphs import batch_sizes
from tgis.engines.placement import Placement
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models.attention.backends import Chosen
from tgis.models.attention.flex import make_flex

pytestmark = pytest.mark.usefixtures("single_thread")

SIZE = 16  # tokens of a block
LENGTHS = (5, 20, 1, 31, 16)


class Eager:
    """Computes into the same result from the same inputs, as a graph does; counts."""

    def __init__(self, most: int = 100) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []
        self.most = most

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = run()
        if len(result) > self.most:
            raise torch.OutOfMemoryError("too large")
        self.captured.append(len(result))

        def replay() -> None:
            self.replayed.append(len(result))
            result.copy_(run())

        return replay, result


@pytest.fixture(params=["qwen2-window", "bloom"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = Chosen("flex", make_flex(eager_flex), SIZE, True)
    monkeypatch.setattr(native, "choose_backend", lambda *_: chosen)
    save_checkpoint(tmp_path, CONFIGS[request.param])
    return tmp_path


def engine_of(path: Path, eager: Eager | None, max_running: int = 6) -> native.NativeEngine:
    config = json.loads((path / "config.json").read_text())
    placement = Placement(torch.device("cpu"), "blocks")
    engine = native.load(path, config, torch.float32, placement=placement)
    engine.capture = eager
    engine.allocate(CacheShape(20, SIZE, 64, max_running))
    rows = [Row(s, s, random_ids(s, n), 0, Want.LAST, table(s)) for s, n in enumerate(LENGTHS)]
    engine.forward(StepPlan(rows))
    return engine


def table(slot: int) -> list[int]:
    return [slot, 19 - slot, 10 + slot][: 3 if slot else 2]


def decoding(slots: list[int], step: int) -> StepPlan:
    tokens = {slot: random_ids(9 + slot + step, 1) for slot in slots}
    rows = [Row(s, s, tokens[s], LENGTHS[s] + step, Want.LAST, table(s)) for s in slots]
    return StepPlan(rows)


def test_replayed_steps_equal_called_ones(path: Path) -> None:
    eager = Eager()
    graphs, plain = engine_of(path, eager), engine_of(path, None)
    assert eager.captured == [6, 4, 2, 1]
    wanted = []
    for step in range(9):
        # the company changes, and so does everybody's place in it
        slots = [s for s in (2, 0, 3, 1, 4) if (step + s) % 3]
        expected = plain.forward(decoding(slots, step))
        found = graphs.forward(decoding(slots, step))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        wanted.append(min(size for size in (1, 2, 4, 6) if size >= len(slots)))
    assert eager.replayed == wanted


def test_other_steps_are_called(path: Path) -> None:
    eager = Eager()
    graphs, plain = engine_of(path, eager, max_running=2), engine_of(path, None)
    prompt = Row(9, 5, random_ids(7, 9), 0, Want.LAST, [6, 7])
    quiet = decoding([3], 0)
    quiet.rows[0].want = Want.NOTHING
    many = decoding([0, 1, 2], 0)
    for plan in (StepPlan([*decoding([0], 0).rows, prompt]), quiet, many):
        torch.testing.assert_close(graphs.forward(plan), plain.forward(plan), rtol=0, atol=1e-5)
    assert not eager.replayed


def test_what_has_no_memory_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eager = Eager(most=3)
    with caplog.at_level(logging.INFO):
        graphs = engine_of(path, eager)
    assert eager.captured == [2, 1]
    assert "no memory for a graph of 6 sequences" in caplog.text
    assert "decoding is captured for batches of 1, 2" in caplog.text
    graphs.forward(decoding([0, 1, 2], 0))
    assert not eager.replayed


def test_rows_that_fill_up_write_to_a_block_of_their_own(path: Path) -> None:
    graphs = engine_of(path, Eager())
    assert graphs._cache is not None
    before = [layer.k.clone() for layer in graphs._cache.layers]
    graphs.forward(decoding([0, 1, 3], 0))
    for layer, old in zip(graphs._cache.layers, before, strict=True):
        changed = (layer.k != old).flatten(2).any(-1).nonzero().tolist()
        places = {(table(s)[LENGTHS[s] // SIZE], LENGTHS[s] % SIZE) for s in (0, 1, 3)}
        assert {tuple(place) for place in changed} - {(20, 0)} == places


def test_batch_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(12) == [1, 2, 4, 8, 12]
    assert batch_sizes(100) == [1, 2, 4, *range(8, 65, 8), 80, 96, 100]
