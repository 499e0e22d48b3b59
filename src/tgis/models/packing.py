"""Which layer is made of a weight: by `QUANTIZE`, and by what this machine is fastest at."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgis.errors import ConfigError, ModelError
from tgis.hub.safetensors import Checkpoint
from tgis.models.inputs import CPU
from tgis.models.kernels.grouped import grouped_linear
from tgis.models.kernels.linear import bf16_linear, int8_linear
from tgis.quant import linear
from tgis.quant.bitsandbytes import bitsandbytes_linear, check_bitsandbytes
from tgis.quant.grouped import quantise
from tgis.quant.linear import FORMATS, Formats, Linear, MakeLinear
from tgis.quant.scheme import METHODS, SUFFIX, Scheme, read_scheme
from tgis.quant.stored import load_stored, stored_config

log = logging.getLogger(__name__)

INT4_GROUP = 32  # input features that share a scale under QUANTIZE=int4


class Packing(NamedTuple):
    """How the layers of a network are made: of weights that the checkpoint does not quantise, and
    of those that it stores in one of some formats.

    The head is a layer of its own kind: its results, the logits, are float32.
    """

    make_linear: MakeLinear
    make_head: MakeLinear
    formats: Formats = FORMATS
    head_formats: Formats = FORMATS


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


def _to_float(make: MakeLinear) -> MakeLinear:
    def make_head(weight: Tensor, bias: Tensor | None) -> Linear:
        layer = make(weight, bias)
        return lambda x: layer(x).float()

    return make_head


def _quantised(
    bits: int,
    group_size: int,
    out_dtype: torch.dtype | None = None,
    device: torch.device = CPU,
) -> MakeLinear:
    """Layers of weights that are quantised when they are loaded."""

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        grouped = quantise(weight, bits, group_size)
        return grouped_linear(grouped, bias, weight.dtype, out_dtype, device)

    return make


def _placed(device: torch.device) -> Packing:
    """Layers of floats on another device than the CPU, without the layouts of CPUs."""

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        return linear.dense(weight.to(device), None if bias is None else bias.to(device))

    return Packing(make, _to_float(make))


PLAIN = Packing(make_linear, make_head)
_INT8_HEAD = _quantised(8, -1, torch.float32)

PACKINGS: dict[str, Packing] = {
    "int8-dynamic": Packing(int8_linear, partial(int8_linear, out_dtype=torch.float32)),
    "int8": Packing(_quantised(8, -1), _INT8_HEAD),
    # Logits decide between tokens: the head keeps 8 bits.
    "int4": Packing(_quantised(4, INT4_GROUP), _INT8_HEAD),
    "bitsandbytes": Packing(bitsandbytes_linear, _to_float(bitsandbytes_linear)),
}
"""`QUANTIZE` -> how weights are quantised when they are loaded."""


def _packings(device: torch.device) -> dict[str, Packing]:
    """Those that there are on a device."""
    if device.type == "cpu":
        return PACKINGS
    head = _quantised(8, -1, torch.float32, device)

    def bitsandbytes(weight: Tensor, bias: Tensor | None) -> Linear:
        return bitsandbytes_linear(weight.to(device), None if bias is None else bias.to(device))

    return {
        "int8": Packing(_quantised(8, -1, device=device), head),
        "int4": Packing(_quantised(4, INT4_GROUP, device=device), head),
        "bitsandbytes": Packing(bitsandbytes, _to_float(bitsandbytes)),
    }


def choose_packing(
    quantize: str | None,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    device: torch.device = CPU,
) -> Packing:
    """The packing for a setting and a checkpoint.

    Args:
        quantize: `QUANTIZE`.
        dtype: of the arithmetic between the layers.
        scheme: how the checkpoint's weights are quantised already.
        device: where the layers compute.

    Raises:
        ConfigError: there is none of this name, not for this type, device or checkpoint.
        ModelError: `QUANTIZE` is how weights are stored, but these are not.
    """
    if scheme is not None:
        if quantize not in (None, scheme.method):
            raise ConfigError(
                f"QUANTIZE = {quantize}: the model's weights are quantised already, by"
                f" {scheme.method}; leave QUANTIZE unset"
            )
        return _stored(scheme, device)
    if quantize is None:
        return PLAIN if device.type == "cpu" else _placed(device)
    if quantize in METHODS:
        raise ModelError(
            f"Cannot load `{quantize}` weight, make sure the model is already quantized, or"
            " quantize it with `text-generation-server quantize ORIGINAL_MODEL_ID NEW_MODEL_ID`"
        )
    packings = _packings(device)
    if quantize not in packings:
        possible = ", ".join(packings)
        raise ConfigError(
            f"QUANTIZE = {quantize}: not supported by this version on {device.type} (only"
            f" {possible})"
        )
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError(f"QUANTIZE = {quantize}: not with DTYPE = float16 (bfloat16, float32)")
    if quantize == "bitsandbytes":
        check_bitsandbytes()
    log.info("linear layers become %s as they are loaded: asked for", quantize)
    return packings[quantize]


def _stored(scheme: Scheme, device: torch.device) -> Packing:
    """For a checkpoint with a scheme; what of it is not quantised stays so."""
    make = partial(grouped_linear, device=device)
    make_head = partial(grouped_linear, out_dtype=torch.float32, device=device)
    layers: Formats = {SUFFIX: partial(load_stored, scheme, make)}
    head: Formats = {SUFFIX: partial(load_stored, scheme, make_head)}
    plain = PLAIN if device.type == "cpu" else _placed(device)
    return plain._replace(formats=layers | FORMATS, head_formats=head | FORMATS)


def read_packing(
    quantize: str | None,
    dtype: torch.dtype,
    checkpoint: Checkpoint,
    quantization: Mapping[str, Any] | None,
    device: torch.device = CPU,
) -> Packing:
    """The packing for a setting and an opened checkpoint, whose headers are checked.

    Args:
        quantize: `QUANTIZE`.
        dtype: of the arithmetic between the layers.
        checkpoint: holds the weights.
        quantization: `quantization_config` of config.json, or what stands for it.
        device: where the layers compute.

    Raises:
        ConfigError, ModelError: see `choose_packing` and `read_scheme`.
    """
    scheme = read_scheme(stored_config(checkpoint) or quantization, checkpoint.infos)
    packing = choose_packing(quantize, dtype, scheme, device)
    if scheme is not None:
        log.info("Weights are quantised: %s", scheme)
        if device.type == "cpu" and dtype == torch.float16:
            log.warning(
                "quantised weights are slow with DTYPE = float16 on this device; use bfloat16"
            )
    return packing
