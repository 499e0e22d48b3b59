"""What `test_outputs` says of rows is true of blocks, against the answers that rows give."""

import json
from pathlib import Path

import pytest
import torch
from tests.core.test_outputs import (
    LENGTH,
    Lab,
    requests,
    test_from_the_cache_one_after_the_other,
    test_from_the_cache_the_second_time,
    test_in_a_batch_and_in_chunks,
    test_preempted,
    test_preempted_with_the_cache_full,
)
from tests.kit.core_house import open_house
from tests.models.block_twins import CPU

from tgis.core.kv.blocks import BlocksMemory
from tgis.engines import native
from tgis.engines.base import CacheShape, Engine
from tgis.engines.placement import Placement

pytestmark = pytest.mark.usefixtures("single_thread")

__all__ = [
    "test_from_the_cache_one_after_the_other",
    "test_from_the_cache_the_second_time",
    "test_in_a_batch_and_in_chunks",
    "test_preempted",
    "test_preempted_with_the_cache_full",
]


class BlocksLab(Lab):
    """Alone in rows, all else in blocks."""

    def __init__(self, directory: Path) -> None:
        self.layout = "rows"
        super().__init__(directory)
        self.layout = "blocks"

    def whole(self, num_tokens: int) -> int:
        return num_tokens // 16 * 16

    def engine(self, slots: int, tokens: int) -> Engine:
        if self.layout == "rows":
            return super().engine(slots, tokens)
        config = json.loads((self.directory / "config.json").read_text())
        engine = native.load(
            self.directory, config, torch.float32, placement=Placement(CPU, "blocks")
        )
        size = engine.caps.kv_granule
        engine.allocate(CacheShape(tokens // size, size, LENGTH))
        return engine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> BlocksLab:
    return BlocksLab(tmp_path_factory.mktemp("llama"))


def test_blocks_are_shared_while_both_run(lab: BlocksLab) -> None:
    """The second begins as the first does, which is still running: 4 whole blocks."""
    first, second, *_ = requests()
    engine = lab.engine(2, 1000)
    with open_house(lab.directory, 2, 1000, 500, engine=engine) as house:
        front = house.connect()
        front.send(first)
        house.turn(3)
        front.send(second)
        house.turn(1)
        assert house.scheduler.num_running == 2
        assert isinstance(house.memory, BlocksMemory)
        one, other = house.memory._tables.values()
        assert one[:4] == other[:4]
        assert not {*one[4:]} & {*other[4:]}
        house.run(front)
        assert front.tokens == {i: lab.alone.tokens[i] for i in range(2)}
