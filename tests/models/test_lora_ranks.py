"""LoRA on a model that is split over ranks: each takes its part of every matrix."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines import test_native_seq2seq as t5
from tests.engines.test_ranks import EIGHT_HEADS, QUICK, eight_heads, forward, load, split
from tests.kit.ranks import Ranks, connected
from tests.models.lora_twins import random_lora, targets
from tests.models.twins import random_ids, save_checkpoint

from tgis.engines.plan import Row, StepPlan, Want

pytestmark = pytest.mark.usefixtures("single_thread")

NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in [*EIGHT_HEADS, "t5", "t5-1.1"]
]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with connected(request.param) as found:
        yield found


def save(name: str, path: Path) -> None:
    if name in t5.CONFIGS:
        config: Any = t5.CONFIGS[name]
        t5.save(type(config)(**{**config.to_dict(), "num_heads": 8, "d_ff": 64}), path)
    else:
        save_checkpoint(path, eight_heads(name))


@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_what_one_does(ranks: Ranks, tmp_path: Path, name: str) -> None:
    save(name, tmp_path)
    alone, engines = load(tmp_path), split(tmp_path, ranks)
    for handle, of_ranks in ((1, (4,)), (2, (1, 8, 3))):
        lora = random_lora(targets(alone).values(), of_ranks, seed=handle)
        for engine in (alone, *engines):
            engine.attach(handle, lora)
    sequences = {slot: random_ids(slot, 12) for slot in range(3)}
    source = random_ids(9, 13) if name in t5.CONFIGS else None
    for start, stop in ((0, 7), (7, 11), (11, 12)):
        rows = [
            Row(slot, slot, ids[start:stop], start, Want.ALL, encoder_ids=source, lora=slot)
            for slot, ids in sequences.items()
        ]
        for row in rows:
            row.encoder_ids = source if start == 0 else None
        expected = alone.forward(StepPlan(rows))
        computed = forward(engines, ranks, StepPlan(rows))
        torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)
