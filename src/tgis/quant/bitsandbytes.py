"""Layers of the bitsandbytes library: LLM.int8 (arXiv:2208.07339), as TGIS uses it.

The library is an extra; it is imported when the first layer is made.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from tgis.errors import ConfigError
from tgis.quant.linear import Linear

_THRESHOLD = 6.0  # input features with larger values are computed in full precision
_INSTALL = "pip install 'tgis[bitsandbytes]'"


def check_bitsandbytes() -> None:
    """Refuse the setting where the library is missing.

    Raises:
        ConfigError: it cannot be imported; the message says how to install it.
    """
    _library()


def bitsandbytes_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer of a weight [out, in] in memory, which the caller should then forget.

    Raises:
        ConfigError: the library cannot be imported.
    """
    nn = _library().nn
    out, features = weight.shape
    layer = nn.Linear8bitLt(
        features, out, bias is not None, has_fp16_weights=False, threshold=_THRESHOLD, device="meta"
    )
    layer.weight = nn.Int8Params(weight.float(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer.to(weight.device).eval()  # quantises

    def linear(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that x is cast to float16, which is meant
            y: Tensor = layer(x)
        return y

    return linear


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"QUANTIZE = bitsandbytes: the library cannot be imported ({error}); {_INSTALL}"
        ) from error
    return bitsandbytes
