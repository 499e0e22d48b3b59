"""GPTQ (Frantar et al., arXiv:2210.17323): weights rounded one input feature after the other.

What rounding an input feature loses is made up for by those that come after it, as far as the
inputs' second moments (the Hessian of the layer's squared error) say that they can.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.errors import ModelError
from tgis.quant.grouped import MIDDLE, Grouped
from tgis.quant.scheme import ZERO_OFFSETS

_BLOCK = 128  # input features whose losses reach the others together
_MORE_DAMPING = (1.0, 10.0, 100.0)  # tried in turn where the Hessian cannot be inverted


@dataclass(frozen=True, slots=True)
class Options:
    """How weights are quantised; names as in `quantization_config`."""

    bits: int = 4
    group_size: int = 128  # -1: all input features
    damp_percent: float = 0.01  # of the Hessian's mean diagonal, added to it
    desc_act: bool = False  # input features with large inputs first
    sym: bool = True  # all zero points in the middle of the range

    @property
    def checkpoint_format(self) -> str:
        """In which weights are stored: the first is read everywhere, but only if symmetric.

        Its zero points are minus one, which old programs got wrong; some refuse others therefore.
        """
        return "gptq" if self.sym else "gptq_v2"

    def size(self, in_features: int) -> int:
        """Input features of a group."""
        return in_features if self.group_size < 0 else self.group_size


class Moments:
    """The sum of x x' over a layer's inputs x, in float32."""

    def __init__(self, in_features: int) -> None:
        self.hessian = torch.zeros(in_features, in_features)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., in_features]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.hessian.addmm_(rows.T, rows)
        self.count += len(rows)


def quantise_gptq(weight: Tensor, hessian: Tensor, options: Options, name: str) -> Grouped:
    """Quantise a weight [out, in] for inputs with these second moments [in, in].

    Scales are what float16 holds.

    Raises:
        ModelError: not finite, or the Hessian cannot be inverted even with more damping.
    """
    w, h = weight.to(torch.float32, copy=True), hessian.clone()
    if not (torch.isfinite(w).all() and torch.isfinite(h).all()):
        raise ModelError(f"{name}: its weights, or its inputs with this text, are not finite")
    features, size = w.shape[1], options.size(w.shape[1])
    dead = h.diagonal() == 0  # inputs that are always zero
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    order = torch.arange(features)
    if options.desc_act:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
        w, h = w[:, order], h[order][:, order]
    q, scale, zero = _round_in_turn(w, _inverse(h, options.damp_percent, name), size, options)
    back = torch.argsort(order)
    return Grouped(options.bits, q[:, back], scale, zero, (torch.arange(features) // size)[back])


def _inverse(hessian: Tensor, damp_percent: float, name: str) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    mean = hessian.diagonal().mean()
    for more in _MORE_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damp_percent * more * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise ModelError(
        f"{name}: the Hessian of its inputs cannot be inverted; use more text, or a larger"
        " --percdamp"
    )


def _round_in_turn(
    w: Tensor, upper: Tensor, size: int, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of w, which is changed.

    Returns:
        q uint8 [out, in], scale float32 [out, groups], zero int16 [out, groups].
    """
    out, features = w.shape
    num_groups = -(-features // size)
    q = torch.empty(out, features, dtype=torch.uint8)
    scale, zero = torch.empty(out, num_groups), torch.empty(out, num_groups)
    most = 2**options.bits - 1
    for start in range(0, features, _BLOCK):
        stop = min(start + _BLOCK, features)
        block, losses = w[:, start:stop], torch.empty(out, stop - start)
        local = upper[start:stop, start:stop]
        for i in range(stop - start):
            g, within = divmod(start + i, size)
            if within == 0:
                # What lies beyond this block has not been told of its losses yet.
                group = w[:, start + i : start + i + size].clone()
                if start + i + size > stop:
                    late = slice(stop, start + i + size)
                    group[:, stop - start - i :] -= losses[:, :i] @ upper[start : start + i, late]
                scale[:, g], zero[:, g] = _range(group, options)
            s, z = scale[:, g], zero[:, g]
            values = torch.round(block[:, i] / s).add_(z).clamp_(0, most)
            q[:, start + i] = values.to(torch.uint8)
            losses[:, i] = (block[:, i] - s * (values - z)) / local[i, i]
            block[:, i:] -= torch.outer(losses[:, i], local[i, i:])
        w[:, stop:] -= losses @ upper[start:stop, stop:]
    return q, scale, zero.to(torch.int16)


def _range(group: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out] of a group [out, size]."""
    most = 2**options.bits - 1
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    if options.sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = _half((high - low) / most)
    if options.sym:
        return scale, torch.full_like(scale, MIDDLE[options.bits])
    return scale, torch.round(-low / scale).clamp(0, most)


def _half(scale: Tensor) -> Tensor:
    """As float16 holds it; no zero."""
    smallest = float(torch.finfo(torch.float16).tiny)
    return scale.clamp(smallest, 65504.0).half().float()


def gptq_tensors(name: str, weight: Grouped, checkpoint_format: str) -> dict[str, Tensor]:
    """A weight as GPTQ's formats store it (see `quant.stored`), by tensor name.

    Raises:
        ModelError: its sizes do not fill whole words.
    """
    out, features = weight.q.shape
    per_word = 32 // weight.bits
    if out % per_word or features % per_word:
        raise ModelError(
            f"{name}: a weight of {out} x {features} cannot be stored with {weight.bits} bits;"
            f" both must be multiples of {per_word}"
        )
    zero = (weight.zero.T - ZERO_OFFSETS[checkpoint_format]).to(torch.uint8)
    return {
        f"{name}.qweight": _words(weight.q, weight.bits).T.contiguous(),
        f"{name}.qzeros": _words(zero, weight.bits),
        f"{name}.scales": weight.scale.T.to(torch.float16).contiguous(),
        f"{name}.g_idx": weight.group.to(torch.int32),
    }


def _words(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, n x bits / 32], the first value lowest."""
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    return values.flatten().view(torch.int32).view(len(values), -1)
