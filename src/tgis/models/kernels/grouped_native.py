"""Layers on weights of 4 and 8 bits by one C kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

from tgis.models.kernels.grouped_pack import Pack
from tgis.models.kernels.native import _DTYPES, _empty, _kernel, _like

FIELDS = "ppppppp iiii i ii ii d"  # of the kernel's arguments
_linear_grouped = _kernel("tgis_linear_grouped", FIELDS)


def grouped_product(
    weight: Pack, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """See `reference.grouped_product`."""
    shape = (-(-weight.out_features // 32), weight.in_features // 32 // weight.group_steps, 32)
    num_bytes = shape[0] * weight.in_features * 16 * weight.planes
    addresses = (
        _like(weight.q.flatten(), "q", (num_bytes,), torch.uint8),
        _like(weight.scale, "scale", shape, torch.float16),
        _like(weight.shift, "shift", shape, torch.int16),
        _like(weight.order, "order", (weight.in_features,), torch.int32),
        _like(bias, "bias", (weight.out_features,), dtype),
    )
    features = (weight.cols, weight.in_features, weight.out_features)
    layout = (weight.planes, weight.group_steps, weight.unit_steps)
    types = (_DTYPES[dtype], _DTYPES[out_dtype])

    def linear(x: Tensor, _used: object = (weight, bias)) -> Tensor:
        rows, cols = x.shape
        if cols != weight.cols or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(f"x must be contiguous {dtype} [rows, {weight.cols}]")
        out = _empty((rows, weight.out_features), out_dtype)
        ends = (x.data_ptr(), *addresses, out.data_ptr())
        _linear_grouped(*ends, rows, *features, *layout, *types, weight.unit)
        return out

    return linear
