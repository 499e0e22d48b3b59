"""Linear layers on weights of 4 and 8 bits: by our C kernel where there is one for the dtype."""

import torch
from torch import Tensor

from tgis.models import kernels
from tgis.models.kernels.grouped_pack import pack
from tgis.quant.grouped import Grouped, dequantising
from tgis.quant.linear import Linear


def grouped_linear(
    weight: Grouped,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Linear:
    """A layer of a weight with groups; x [T, in] and bias [out] have the dtype -> [T, out].

    The layer keeps a packed copy; the caller should forget the weight. `out_dtype`: the dtype
    unless given; else float32 or bfloat16. `device`: where it computes, the weight's unless given.
    """
    if device is not None and device != weight.q.device:
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
    on_cpu = weight.q.device.type == "cpu"
    if on_cpu and weight.q.numel() and dtype in (torch.bfloat16, torch.float32):
        layer = kernels.grouped_product(pack(weight), bias, dtype, out_dtype or dtype)
        if layer is not None:
            return layer
    reference = dequantising(weight, bias, dtype)
    return reference if out_dtype in (None, dtype) else lambda x: reference(x).to(out_dtype)
