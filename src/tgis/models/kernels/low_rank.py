"""Low-rank additions to layers' outputs by one C kernel; `low_rank_reference` defines them.

Adapters are found by their addresses, one per row: any number of them can be mixed in a step, and
they may come and go without anything that a step has recorded becoming stale.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from tgis.models.kernels.low_rank_reference import Pair, Site
from tgis.models.kernels.native import _flag, _kernel, _like

__all__ = ["Adapter", "Pair", "Site", "add_"]

_PARTS = 3
_OUTPUTS = 16  # the kernel reads so many at a time
_NOTHING: list[Tensor | int] = [0] * (1 + 2 * _PARTS)
_LINE = 64  # bytes of a cache line
_HUGE = 2 << 20  # bytes of a huge page
FIELDS = "ppp iii iii ii"  # of the kernel's arguments
_low_rank = _kernel("tgis_low_rank", FIELDS)


class Adapter:
    """See `low_rank_reference.Adapter`."""

    def __init__(self, sites: Sequence[Site | None]) -> None:
        packed = [_pack(site) if site else _NOTHING for site in sites]
        tensors = [t for site in packed for t in site if isinstance(t, Tensor)]
        # All in one piece of memory, of which the kernel has only addresses, in reading order.
        self._memory = _memory(sum(_aligned(t.nbytes) for t in tensors))
        places = iter(_places(self._memory, tensors))
        fields = [[next(places) if isinstance(f, Tensor) else f for f in site] for site in packed]
        self._sites = torch.tensor(fields, dtype=torch.int64)
        self.address = self._sites.data_ptr()
        self.num_bytes = self._memory.nbytes + self._sites.nbytes


def _pack(site: Site) -> list[Tensor | int]:
    """The fields of the kernel's `struct site`, tensors instead of their addresses."""
    pairs = [_even(pair) for pair in site.parts]
    a = [pair.a for pair in pairs if pair]
    missing = [0] * (_PARTS - len(pairs))
    b = [_packed(pair.b, site.dtype) if pair else 0 for pair in pairs]
    ranks = [len(pair.a) if pair else 0 for pair in pairs]
    return [_packed(torch.cat(a), site.dtype) if a else 0, *b, *missing, *ranks, *missing]


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] as the kernel reads it."""
    together = 4 // dtype.itemsize  # inputs that lie side by side
    rows, cols = weight.shape
    padded = functional.pad(weight.to(dtype), (0, -cols % together, 0, -rows % _OUTPUTS))
    blocks = padded.view(len(padded) // _OUTPUTS, _OUTPUTS, -1, together)
    return blocks.transpose(1, 2).contiguous()


def _places(memory: Tensor, tensors: Sequence[Tensor]) -> Iterator[int]:
    """Copy tensors into memory, one after the other; the address of each."""
    at = 0
    for tensor in tensors:
        place = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        yield place.copy_(tensor).data_ptr()
        at += _aligned(tensor.nbytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def _memory(num_bytes: int) -> Tensor:
    """Bytes, on huge pages if they fill some and the system has them: it reads those faster."""
    if num_bytes < _HUGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    mapped = mmap.mmap(-1, num_bytes + _HUGE)
    with suppress(OSError, AttributeError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + num_bytes]


def _even(pair: Pair | None) -> Pair | None:
    """The same with an even rank."""
    if pair is None or len(pair.a) % 2 == 0:
        return pair
    return Pair(functional.pad(pair.a, (0, 0, 0, 1)), functional.pad(pair.b, (0, 1)))


def add_(y: Tensor, x: Tensor, rows: Tensor, site: int, widths: tuple[int, ...]) -> Tensor:
    """See `low_rank_reference.add_`."""
    num_rows, num_inputs = x.shape
    if y.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"y must be {x.dtype} or float32, not {y.dtype}")
    _low_rank(
        _like(y, "y", (num_rows, sum(widths)), y.dtype),
        _like(x, "x", (num_rows, num_inputs), x.dtype),
        _like(rows, "rows", (num_rows,), torch.int64),
        num_rows,
        num_inputs,
        site,
        *chain(widths, [0] * (_PARTS - len(widths))),
        _flag(x, "x"),
        _flag(y, "y"),
    )
    return y
