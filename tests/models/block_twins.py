"""The native engine on the `blocks` layout behind the interface of the twins."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tests.models.twins import NUM_SLOTS, SLOT_TOKENS
from torch import Tensor

from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.placement import Placement
from tgis.engines.plan import KvCopy, StepPlan

CPU = torch.device("cpu")
_STRIDE = 3  # prime to the number of blocks: neighbours of a sequence lie far apart


class InBlocks:
    """An engine whose slots are made of blocks, scattered over the pool.

    A copy of a prefix shares its blocks, as far as they are whole, and computes nothing else: so
    `copies` of a plan must be of whole blocks.
    """

    def __init__(self, engine: native.NativeEngine) -> None:
        self.engine = engine
        self.caps = engine.caps
        size = engine.caps.kv_granule
        per_slot = -(-SLOT_TOKENS // size)
        count = NUM_SLOTS * per_slot + 1
        while count % _STRIDE == 0:
            count += 1
        scattered = [number * _STRIDE % count for number in range(count)]
        self.tables = {s: scattered[s * per_slot : (s + 1) * per_slot] for s in range(NUM_SLOTS)}
        engine.allocate(CacheShape(count, size, SLOT_TOKENS))

    def forward(self, plan: StepPlan) -> Tensor:
        for copy in plan.copies:
            self.share(copy)
        rows = [replace(row, block_table=self.tables[row.slot]) for row in plan.rows]
        return self.engine.forward(StepPlan(rows))

    def share(self, copy: KvCopy) -> None:
        whole, rest = divmod(copy.num_tokens, self.caps.kv_granule)
        assert not rest
        self.tables[copy.target][:whole] = self.tables[copy.source][:whole]

    def release(self, slots: list[int]) -> None:
        self.engine.release(slots)


def load_blocks(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    attention: str | None = None,
) -> InBlocks:
    """The engine alone, its cache allocated."""
    config = json.loads((path / "config.json").read_text())
    placement = Placement(device, "blocks", attention)
    return InBlocks(native.load(path, config, dtype, placement=placement))
