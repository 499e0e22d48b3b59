"""Which number type a model computes in."""

import torch

from tgis.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str | None, device: str = "cpu") -> tuple[torch.dtype, str]:
    """The type for a setting, and why, for the log.

    Without a setting: float16 on a CUDA device, as TGIS; bfloat16 where the CPU computes in it;
    else float32.

    Args:
        device: type of the device that computes.

    Raises:
        ConfigError: not the name of such a type.
    """
    if name:
        if name not in DTYPES:
            raise ConfigError(f"Unrecognized data type: {name} (DTYPE; one of {', '.join(DTYPES)})")
        return DTYPES[name], "asked for"
    if device == "cuda":
        return torch.float16, "what a CUDA device computes in unless asked otherwise"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "the CPU computes in bfloat16"
    return torch.float32, "the CPU has no bfloat16 arithmetic"
