"""The fastest layer that this machine has for a weight that is not quantised."""

import torch
from torch import Tensor

from tgis.models.kernels.linear import bf16_linear
from tgis.quant import linear
from tgis.quant.linear import Linear


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer of a weight [out, in] in memory, which the caller should then forget."""
    on_cpu = weight.device.type == "cpu"
    if on_cpu and weight.dtype == torch.bfloat16 and linear.can_pack(torch.bfloat16):
        return bf16_linear(weight, bias)
    return linear.make_linear(weight, bias)
