"""How `csrc/grouped.c` has weights of 4 and 8 bits in memory; that file describes the layout."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tgis.quant.grouped import MIDDLE, Grouped

_STEP = 32  # input features of a step
_WIDTH = 32  # output features of a block
_STRIP_STEPS = 8  # of one plane of 4 bits that the kernel has in cache


class Pack(NamedTuple):
    """A weight [out_features, cols] in the kernel's layout."""

    q: Tensor  # uint8, flat
    scale: Tensor  # float16 [blocks, groups, 32]
    shift: Tensor | None  # int16, likewise
    order: Tensor | None  # int32 [in_features]: the columns of x, -1 where there is none
    cols: int  # of x
    in_features: int  # a multiple of 32
    out_features: int
    planes: int
    group_steps: int
    unit_steps: int
    unit: float


def pack(weight: Grouped) -> Pack:
    """Put input features into steps of one group each, and all into the kernel's order."""
    out, cols = weight.q.shape
    order, groups, group_steps = _order(weight.group)
    q = functional.pad(weight.q, (0, 1), value=0)[:, order] if len(order) else weight.q
    q = functional.pad(q, (0, 0, 0, -out % _WIDTH))
    in_order = torch.arange(len(order))
    natural = torch.equal(order[:cols], in_order[:cols]) and bool((order[cols:] == cols).all())
    planes = weight.bits // 4
    scale, unit = _halves(weight.scale[:, groups])
    shift = MIDDLE[weight.bits] - weight.zero[:, groups]
    return Pack(
        q=torch.stack([_plane(q >> 4), _plane(q & 15)], 2) if planes == 2 else _plane(q),
        scale=_blocks(scale),
        shift=_blocks(shift) if shift.any() else None,
        order=None if natural else torch.where(order == cols, -1, order).to(torch.int32),
        cols=cols,
        in_features=len(order),
        out_features=out,
        planes=planes,
        group_steps=group_steps,
        unit_steps=next(n for n in (8, 4, 2, 1) if n * planes <= 8 and group_steps % n == 0),
        unit=unit,
    )


def _order(group: Tensor) -> tuple[Tensor, Tensor, int]:
    """Input features by group, each group filled up to whole steps of equal number.

    Returns:
        Columns [in_features], where the number of columns stands for none; the group of each run of
        steps; steps of a run.
    """
    cols = len(group)
    present, counts = torch.unique(group, return_counts=True)
    steps = -(-counts // _STEP)
    run = int(torch.gcd(steps[0], steps).min()) if len(steps) else 1
    while (steps % run).any():
        run -= 1
    order = torch.full((int(steps.sum()) * _STEP,), cols)
    starts = torch.cumsum(steps, 0) - steps
    by_group = torch.argsort(group, stable=True)
    within = torch.arange(cols) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    order[torch.repeat_interleave(starts * _STEP, counts) + within] = by_group
    return order, torch.repeat_interleave(present, steps // run), run


def _plane(q: Tensor) -> Tensor:
    """Values of 4 bits [out, in] -> uint8 [blocks, steps, 2, 4, 16, 2, 2]; see `csrc/grouped.h`."""
    # output: block, half, one of 16; input: step, of 4, of 4 that share a word, of a pair
    parts = q.view(len(q) // _WIDTH, 2, 16, -1, 4, 4, 2)
    first = parts[..., 0, :] | parts[..., 1, :] << 4
    second = parts[..., 2, :] | parts[..., 3, :] << 4
    return torch.stack([first, second], -1).permute(0, 3, 1, 4, 2, 5, 6).contiguous()


def _blocks(values: Tensor) -> Tensor:
    """[out, groups] -> [blocks, groups, 32], filled up with zeros."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % _WIDTH))
    return padded.view(-1, _WIDTH, values.shape[1]).transpose(1, 2).contiguous()


def _halves(scale: Tensor) -> tuple[Tensor, float]:
    """Scales as float16 and what they are to be multiplied by, a power of two."""
    half = scale.half()
    if torch.equal(half.float(), scale):
        return half, 1.0
    largest = scale.abs().max().clamp(2.0**-120)
    unit = 2.0 ** float(torch.frexp(largest).exponent - 14)
    return (scale / unit).half(), unit
