"""Low-rank additions to layers' outputs by one C kernel; `low_rank_reference` defines them.

Adapters are found by their addresses, one per row: any number of them can be mixed in a step, and
they may come and go without anything that a step has recorded becoming stale.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from tgis.models.kernels.low_rank_reference import Pair, Site
from tgis.models.kernels.native import _flag, _kernel, _like

__all__ = ["Adapter", "Pair", "Site", "add_"]

_PARTS = 3
_OUTPUTS = 16  # the kernel reads so many at a time
FIELDS = "ppp iii iii ii"  # of the kernel's arguments
_low_rank = _kernel("tgis_low_rank", FIELDS)


class Adapter:
    """See `low_rank_reference.Adapter`."""

    def __init__(self, sites: Sequence[Site | None]) -> None:
        self._tensors: list[Tensor] = []  # the kernel has only their addresses
        fields = [self._pack(site) if site else [0] * (1 + 2 * _PARTS) for site in sites]
        self._sites = torch.tensor(fields, dtype=torch.int64)
        self.address = self._sites.data_ptr()
        self.num_bytes = sum(t.nbytes for t in self._tensors) + self._sites.nbytes

    def _pack(self, site: Site) -> list[int]:
        """The fields of the kernel's `struct site`."""
        pairs = [_even(pair) for pair in site.parts]
        a = [pair.a for pair in pairs if pair]
        missing = [0] * (_PARTS - len(pairs))
        b = [self._keep(pair.b, site.dtype) if pair else 0 for pair in pairs] + missing
        ranks = [len(pair.a) if pair else 0 for pair in pairs] + missing
        return [self._keep(torch.cat(a), site.dtype) if a else 0, *b, *ranks]

    def _keep(self, weight: Tensor, dtype: torch.dtype) -> int:
        """The address of a packed copy of [out, in]."""
        together = 4 // dtype.itemsize  # inputs that lie side by side
        rows, cols = weight.shape
        padded = functional.pad(weight.to(dtype), (0, -cols % together, 0, -rows % _OUTPUTS))
        blocks = padded.view(len(padded) // _OUTPUTS, _OUTPUTS, -1, together)
        packed = blocks.transpose(1, 2).contiguous()
        self._tensors.append(packed)
        return packed.data_ptr()


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
