"""Linear layers on one packed copy of their weight, for one row and for thousands.

The weight lies in oneDNN's blocked layout. Our AMX kernel (`csrc/linear.c`) reads it there, if its
bytes are found to be where that expects them; otherwise, and for many rows of bfloat16, oneDNN's
own operators do.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tgis.models import kernels
from tgis.quant import tiles

MANY_ROWS = 128
"""Above so many rows of bfloat16 oneDNN's product is the faster one ..."""

_NARROW_ROWS, _NARROW = 256, 1024
"""... but not of more rows than these with a layer of at most so many output features, which oneDNN
divides badly between its threads."""

_PACK_ROWS = 128  # the hint that makes oneDNN pack bfloat16 in blocks of 32 output features

Linear = Callable[[Tensor], Tensor]


def bf16_linear(
    weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Linear:
    """A layer of a weight [N, K] and a bias [N], both bfloat16; x [T, K] bfloat16 -> [T, N].

    The layer keeps a packed copy; the caller should forget the weight. `out_dtype`: bfloat16, or
    float32 (for logits).
    """

    def pack(rows: Tensor) -> Tensor:
        blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(rows, _PACK_ROWS)
        return blocked

    ours = _on_tiles(weight, pack, None, bias, weight.dtype, out_dtype)
    if ours is not None and ours.padded:
        return ours.run
    blocked = pack(weight) if ours is None else ours.blocked
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def onednn(x: Tensor) -> Tensor:
        return tiles.multiplied(lambda x: multiply(x, blocked, bias, "none", [], ""), x).to(
            out_dtype
        )

    if ours is None:
        return onednn
    run, narrow = ours.run, len(weight) <= _NARROW

    def linear(x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows <= MANY_ROWS or (narrow and rows > _NARROW_ROWS):
            return run(x)
        return onednn(x)

    return linear


def int8_linear(
    weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Linear:
    """A layer that computes with int8; x is bfloat16 or float32, as weight and bias are.

    Each output feature's weights are scaled to -127 .. 127, and so is each row of x when the layer
    is called. `out_dtype`: the weight's unless given.
    """
    dtype = weight.dtype
    out_dtype = out_dtype or dtype
    q, scale = kernels.quantize_rows(weight)

    def pack(rows: Tensor) -> Tensor:
        blocked: Tensor = torch.ops.onednn.qlinear_prepack(rows, [_PACK_ROWS, rows.shape[1]])
        return blocked

    ours = _on_tiles(q, pack, scale, bias, dtype, out_dtype)
    if ours is not None:
        return ours.run
    blocked = pack(q)
    zero_points = torch.zeros(len(q), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise.default

    def onednn(x: Tensor) -> Tensor:
        # oneDNN knows one scale for all of x: it gets 1, and the rows' own scales come afterwards.
        rows, row_scale = kernels.quantize_rows(x)
        y = tiles.multiplied(
            lambda rows: multiply(
                *(rows, 1.0, 0, blocked, scale, zero_points),
                *(None, 1.0, 0, x.dtype, "none", [], ""),  # no bias, no scale, no activation
            ),
            rows,
        )
        return kernels.scale_rows_(y, row_scale, bias).to(out_dtype)

    return onednn


class _Ours(NamedTuple):
    """Our kernel on a pack."""

    run: Linear
    blocked: Tensor
    padded: bool  # the pack has more output features than the layer


def _on_tiles(
    weight: Tensor,
    pack: Callable[[Tensor], Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> _Ours | None:
    """Our kernel on oneDNN's pack of this weight; None where it cannot be used."""
    if not len(weight) or weight.shape[1] * weight.element_size() % 64:
        return None
    width = 64 if weight.dtype == torch.int8 else 32  # output features of a block
    missing = -len(weight) % width
    padded = functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    blocked = pack(padded)
    if not _is_expected(blocked, padded, width):
        return None
    address: int = torch.ops.mkldnn.data_ptr(blocked)
    run = kernels.amx_linear(address, len(weight), weight.shape[1], scale, bias, dtype, out_dtype)
    if run is None:
        return None
    used = (blocked, scale, bias)  # the kernel has only their addresses

    def linear(x: Tensor, _used: object = used) -> Tensor:
        return run(x)

    return _Ours(linear, blocked, len(padded) > len(weight))


def _is_expected(blocked: Tensor, weight: Tensor, width: int) -> bool:
    """Whether the pack's first and last blocks are in the layout that `csrc/linear.c` reads."""
    together = 4 // weight.element_size()  # input features that lie side by side
    rows, cols = weight.shape
    block_bytes = width * cols * weight.element_size()
    address: int = torch.ops.mkldnn.data_ptr(blocked)
    for first in (0, rows - width):
        block = weight[first : first + width].view(width, cols // together, together)
        expected = block.transpose(0, 1).contiguous().view(torch.uint8).flatten()
        memory = (ctypes.c_char * block_bytes).from_address(address + first // width * block_bytes)
        if not torch.equal(torch.frombuffer(memory, dtype=torch.uint8), expected):
            return False
    return True
