"""Linear layers on one packed copy of their weight, fast for one row and for thousands.

The weight lies in oneDNN's blocked layout. oneDNN's own operators serve many rows. For few rows,
where reading the weight is the limit, they reach about two thirds of the memory's speed; there our
AMX kernel reads the same memory (`csrc/linear.c`). A pack is only handed to that kernel when its
bytes are found to be in the layout that the kernel expects.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tgis.models import kernels

FEW_ROWS = 64
"""Up to so many rows our kernel is the faster one."""

_PACK_ROWS = 128  # the hint that makes oneDNN pack bfloat16 in blocks of 32 output features

Linear = Callable[[Tensor], Tensor]


def bf16_linear(
    weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Linear:
    """A layer of a weight [N, K] and a bias [N], both bfloat16; x [T, K] bfloat16 -> [T, N].

    The layer keeps a packed copy; the caller should forget the weight. `out_dtype`: bfloat16, or
    float32 (for logits).
    """
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    few = _few_rows(blocked, weight, None, bias, out_dtype)

    def many(x: Tensor) -> Tensor:
        y: Tensor = multiply(x, blocked, bias, "none", [], "")
        return y.to(out_dtype)

    return _by_rows(few, many)


def int8_linear(
    weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Linear:
    """A layer that computes with int8; arguments and calls as of `bf16_linear`.

    Each output feature's weights are scaled to -127 .. 127, and so is each row of x when the layer
    is called.
    """
    q, scale = kernels.quantize_rows(weight)
    blocked = torch.ops.onednn.qlinear_prepack(q, [_PACK_ROWS, q.shape[1]])
    zero_points = torch.zeros(len(q), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise.default
    few = _few_rows(blocked, q, scale, bias, out_dtype)

    def many(x: Tensor) -> Tensor:
        # oneDNN knows one scale for all of x: it gets 1, and the rows' own scales come afterwards.
        rows, row_scale = kernels.quantize_rows(x)
        y: Tensor = multiply(
            *(rows, 1.0, 0, blocked, scale, zero_points),
            *(None, 1.0, 0, x.dtype, "none", [], ""),  # no bias, output not scaled, no activation
        )
        return kernels.scale_rows_(y, row_scale, bias).to(out_dtype)

    return _by_rows(few, many)


def _by_rows(few: Linear | None, many: Linear) -> Linear:
    # The closure keeps `many` alive, and with it the tensors of which `few` has only addresses.
    return many if few is None else lambda x: few(x) if x.shape[0] <= FEW_ROWS else many(x)


def _few_rows(
    blocked: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Linear | None:
    """Our kernel on oneDNN's pack of this weight; None where it cannot be used."""
    if not _is_expected(blocked, weight):
        return None
    address: int = torch.ops.mkldnn.data_ptr(blocked)
    rows, cols = weight.shape
    return kernels.few_rows_linear(address, rows, cols, scale, bias, out_dtype)


def _is_expected(blocked: Tensor, weight: Tensor) -> bool:
    """Whether the pack's first and last blocks are in the layout that `csrc/linear.c` reads."""
    together = 4 // weight.element_size()  # input features that lie side by side
    width = 64 if together == 4 else 32  # output features of a block
    rows, cols = weight.shape
    if rows % width or cols * weight.element_size() % 64 or not rows:
        return False
    block_bytes = width * cols * weight.element_size()
    address: int = torch.ops.mkldnn.data_ptr(blocked)
    for first in (0, rows - width):
        block = weight[first : first + width].view(width, cols // together, together)
        expected = block.transpose(0, 1).contiguous().view(torch.uint8).flatten()
        memory = (ctypes.c_char * block_bytes).from_address(address + first // width * block_bytes)
        if not torch.equal(torch.frombuffer(memory, dtype=torch.uint8), expected):
            return False
    return True
