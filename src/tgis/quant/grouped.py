"""Weights of few bits with a scale and a zero point for each group of them.

What GPTQ and AWQ store, and what weights become that are quantised while they are loaded:

    weight[o, k] = scale[o, g] * (q[o, k] - zero[o, g])    with g = group[k]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tgis.quant.linear import Linear, Span

MIDDLE = {4: 8, 8: 128}
"""Bits -> the zero point of weights that are quantised symmetrically."""

_BLOCK_BYTES = 1 << 24  # of weights that the reference layer has in float32 at a time


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A weight [out, in]."""

    bits: int  # 4 or 8
    q: Tensor  # uint8 [out, in]: values 0 .. 2^bits - 1
    scale: Tensor  # float32 [out, groups]
    zero: Tensor  # int16 [out, groups]
    group: Tensor  # int64 [in]: of each input feature

    def to(self, device: torch.device) -> "Grouped":
        """The same on another device."""
        tensors = (self.q, self.scale, self.zero, self.group)
        return Grouped(self.bits, *(tensor.to(device) for tensor in tensors))

    def columns(self, span: Span) -> "Grouped":
        """Some input features."""
        return replace(self, q=self.q[:, slice(*span)], group=self.group[slice(*span)])

    def rows(self, spans: Sequence[Span]) -> "Grouped":
        """Some output features, in this order."""
        index = torch.cat([torch.arange(*span) for span in spans])
        return replace(self, q=self.q[index], scale=self.scale[index], zero=self.zero[index])


MakeGrouped = Callable[[Grouped, Tensor | None, torch.dtype], Linear]
"""(weight, bias [out] of the dtype or None, dtype of the arithmetic) -> layer."""


def stack(parts: Sequence[Grouped]) -> Grouped:
    """Weights one below the other; all have the same groups."""
    first, *rest = parts
    if not rest:
        return first
    return replace(
        first,
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
    )


def dequantise(weight: Grouped) -> Tensor:
    """The weight as float32 [out, in]."""
    zero = weight.zero.float()[:, weight.group]
    return weight.scale[:, weight.group] * (weight.q.float() - zero)


def dequantising(weight: Grouped, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The layer that is always right: it makes a weight of the dtype anew for each call.

    On every device and for every dtype, a block of output features at a time.
    """
    block = max(1, _BLOCK_BYTES // (4 * max(1, weight.q.shape[1])))
    rows = len(weight.q)
    parts = [weight.rows([(at, min(at + block, rows))]) for at in range(0, rows, block)]

    def linear(x: Tensor) -> Tensor:
        y = torch.cat([functional.linear(x, dequantise(part).to(dtype)) for part in parts], 1)
        return y if bias is None else y + bias

    return linear


def quantise(weight: Tensor, bits: int, group_size: int) -> Grouped:
    """Quantise a weight [out, in] symmetrically, by groups of neighbouring input features.

    A group's scale brings the value that is farthest from zero to that end of the range which has
    one integer more, or a little beyond it, whichever loses least.

    Args:
        weight: of any floating-point type.
        bits: 4 or 8.
        group_size: input features of a group; -1 = all. The last group may be smaller.
    """
    out, features = weight.shape
    size = max(1, features if group_size < 0 else group_size)
    num_groups = -(-features // size)
    q = torch.empty(out, num_groups * size, dtype=torch.uint8)
    scale = torch.empty(out, num_groups)
    block = max(1, _BLOCK_BYTES // (16 * len(_FACTORS[bits]) * max(1, features)))
    for at in range(0, out, block):
        rows = slice(at, at + block)
        padded = functional.pad(weight[rows].float(), (0, num_groups * size - features))
        scale[rows], values = _quantise_groups(padded.view(-1, num_groups, size), bits)
        q[rows] = values.view(-1, num_groups * size)
    return Grouped(
        bits=bits,
        q=q[:, :features],
        scale=scale,
        zero=torch.full(scale.shape, MIDDLE[bits], dtype=torch.int16),
        group=torch.arange(features) // size,
    )


def _quantise_groups(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """groups [out, groups, size] -> scale [out, groups], q uint8 [out, groups, size]."""
    middle = MIDDLE[bits]
    low, high = groups.amin(-1), groups.amax(-1)
    largest = torch.where(high > -low, high, low) / -middle
    scales = torch.stack([_rounded(largest * factor) for factor in _FACTORS[bits]])
    inverse = torch.where(scales == 0, 0.0, 1 / scales).unsqueeze(-1)
    q = (groups * inverse).round_().clamp_(-middle, middle - 1)
    best = (q * scales.unsqueeze(-1)).sub_(groups).square_().sum(-1).argmin(0, keepdim=True)
    chosen = q.take_along_dim(best.unsqueeze(-1), 0)[0].add_(middle).to(torch.uint8)
    return scales.take_along_dim(best, 0)[0], chosen


def _rounded(scale: Tensor) -> Tensor:
    """To the 11 significant bits of a float16, in which layers keep scales."""
    bits = (scale.view(torch.int32) + 0x1000) & ~0x1FFF
    return bits.view(torch.float32)


_FACTORS = {4: (1.0, 0.92, 0.85), 8: (1.0,)}
"""Bits -> scales that are tried, as parts of that which leaves no value out of range."""
