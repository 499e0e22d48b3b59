"""Keys and values of all sequences: in rows (the layout for CPUs), or in blocks (for cards).

Rows: per layer two tensors [num_slots, kv_heads, slot_tokens, head_dim]: in one slot, each head's
tokens lie side by side, so that attention reads them where they are. The memory is one anonymous
mapping a layer, which the operating system commits page by page as it is written; slots may
therefore be as long and as many as address space allows, and a released slot gives its pages back.

Blocks: per layer two tensors [num_blocks, block_tokens, kv_heads, head_dim], as paged kernels read
them; which blocks are whose is in the plan.
"""

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.errors import ModelError

_NORESERVE = 0x4000  # MAP_NORESERVE of Linux; Python names it from 3.13 on


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """One layer's keys and values; `memory` is what rows lie in."""

    k: Tensor
    v: Tensor
    memory: mmap.mmap | None = None


class RowsCache:
    """The cache of a network.

    Args:
        num_slots: sequences that can have a slot at a time.
        slot_tokens: tokens that a slot must hold; rounded up so that heads begin on pages.

    Raises:
        ModelError: the address space does not suffice.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        slot_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        token_bytes = head_dim * dtype.itemsize
        granule = page_tokens(head_dim, dtype)
        slot_tokens = -(-slot_tokens // granule) * granule
        self._slot_bytes = num_kv_heads * slot_tokens * token_bytes
        self._num_slots = num_slots
        shape = (2, num_slots, num_kv_heads, slot_tokens, head_dim)
        self.slot_tokens = slot_tokens
        self.layers = [_layer(shape, dtype) for _ in range(num_layers)]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one slot to another."""
        for layer in self.layers:
            for cache in (layer.k, layer.v):
                cache[target, :, :num_tokens] = cache[source, :, :num_tokens]

    def release(self, slots: Iterable[int]) -> None:
        """Give the pages of these slots back to the operating system; they read as zeros then."""
        values = self._num_slots * self._slot_bytes
        for slot in slots:
            for layer in self.layers:
                assert layer.memory is not None
                for start in (slot * self._slot_bytes, values + slot * self._slot_bytes):
                    layer.memory.madvise(mmap.MADV_DONTNEED, start, self._slot_bytes)


class BlocksCache:
    """The cache of a network in the `blocks` layout, zeros at first.

    What lies in the unwritten part of a block is read by kernels, and then left out by a weight of
    zero: so it must be finite.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is no room for it.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.block_tokens = block_tokens
        shape = (2, num_blocks, block_tokens, num_kv_heads, head_dim)
        self.layers = [
            LayerCache(pool[0], pool[1])
            for pool in (torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        ]


def page_tokens(head_dim: int, dtype: torch.dtype) -> int:
    """Tokens of one head that fill whole pages."""
    return math.lcm(head_dim * dtype.itemsize, mmap.PAGESIZE) // (head_dim * dtype.itemsize)


def _layer(shape: tuple[int, ...], dtype: torch.dtype) -> LayerCache:
    size = dtype.itemsize
    for n in shape:
        size *= n
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise ModelError(
            f"no address space for a key/value cache of {size} bytes a layer: {error}"
        ) from None
    # Huge pages would commit 2 MB for the first token of a head.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    keys, values = torch.frombuffer(memory, dtype=dtype).view(shape).unbind()
    return LayerCache(keys, values, memory)
