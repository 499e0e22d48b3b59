"""Which layer is made of a weight: by `QUANTIZE`, and by what this machine is fastest at."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tgis.errors import ConfigError
from tgis.models.kernels.linear import bf16_linear, int8_linear
from tgis.quant import linear
from tgis.quant.linear import Linear, MakeLinear


class Packing(NamedTuple):
    """How the layers of a network are made of weights that the checkpoint does not quantise.

    The head is a layer of its own kind: its results, the logits, are float32.
    """

    make_linear: MakeLinear
    make_head: MakeLinear


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer of a weight [out, in] in memory, which the caller should then forget."""
    return bf16_linear(weight, bias) if _is_ours(weight) else linear.make_linear(weight, bias)


def make_head(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """As `make_linear`, with results in float32."""
    if _is_ours(weight):
        return bf16_linear(weight, bias, torch.float32)
    layer = linear.make_linear(weight, bias)
    return lambda x: layer(x).float()


def _is_ours(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu"
    return on_cpu and weight.dtype == torch.bfloat16 and linear.can_pack(torch.bfloat16)


PLAIN = Packing(make_linear, make_head)

PACKINGS: dict[str, Packing] = {
    "int8-dynamic": Packing(int8_linear, partial(int8_linear, out_dtype=torch.float32)),
}
"""`QUANTIZE` -> how weights are quantised when they are loaded."""


def choose_packing(quantize: str | None, dtype: torch.dtype) -> Packing:
    """The packing for a setting.

    Args:
        dtype: of the arithmetic between the layers.

    Raises:
        ConfigError: there is none of this name, or not for this type.
    """
    if quantize is None:
        return PLAIN
    if quantize not in PACKINGS:
        possible = ", ".join(PACKINGS)
        raise ConfigError(f"QUANTIZE = {quantize}: not supported by this version (only {possible})")
    if dtype == torch.float16:
        raise ConfigError(f"QUANTIZE = {quantize}: not with DTYPE = float16 (bfloat16, float32)")
    return PACKINGS[quantize]
