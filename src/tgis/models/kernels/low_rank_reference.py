"""Low-rank additions to layers' outputs in plain PyTorch: the definition of `low_rank`."""

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """An update of a weight [out, in]: b @ a."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]


class Site(NamedTuple):
    """One adapter's updates of one layer.

    A layer's output has up to three parts, one after the other (queries, keys, values); None: the
    adapter leaves that part alone.
    """

    parts: tuple[Pair | None, ...]
    dtype: torch.dtype  # of the layer's rows


class Adapter:
    """One adapter, in the form that `add_` reads.

    Args:
        sites: per layer that can be adapted, in one order for all adapters; None: not adapted.

    Attributes:
        address: by which `add_` finds it as long as it lives; not 0.
    """

    def __init__(self, sites: Sequence[Site | None]) -> None:
        self.sites = [
            tuple(part and Pair(*(t.to(site.dtype) for t in part)) for part in site.parts)
            if site
            else ()
            for site in sites
        ]
        tensors = [t for parts in self.sites for pair in parts if pair for t in pair]
        self.num_bytes = sum(t.nbytes for t in tensors)
        self.address = next(_addresses)
        _adapters[self.address] = self


_addresses = itertools.count(1)
_adapters: weakref.WeakValueDictionary[int, Adapter] = weakref.WeakValueDictionary()


def add_(y: Tensor, x: Tensor, rows: Tensor, site: int, widths: tuple[int, ...]) -> Tensor:
    """Add to a layer's output what each row's adapter adds.

    Args:
        y: [T, sum of widths], the layer's output, changed in place.
        x: [T, in], its input, of the same dtype (or y is float32).
        rows: int64 [T], the address of each row's adapter; 0: none.
        site: the layer's place in every adapter's list.
        widths: output features of each part.

    Returns:
        y.
    """
    for address in set(rows.tolist()) - {0}:
        adapter = _adapters[address]
        index = (rows == address).nonzero().squeeze(1)
        some = x[index].float()
        first = 0
        for pair, width in zip(adapter.sites[site] or (None,) * len(widths), widths, strict=True):
            if pair is not None:
                added = (some @ pair.a.float().T) @ pair.b.float().T
                columns = slice(first, first + width)
                y[index, columns] = (y[index, columns].float() + added).to(y.dtype)
            first += width
    return y
