"""Small fused operators for the native engine on CPUs.

Each is a few dozen lines of C (`csrc/`), and has a twin in plain PyTorch (`reference`), which
defines it, documents it and takes its place where no C library can be had. Which of the two is in
use is decided when this package is imported.
"""

from tgis.clib import BuildError
from tgis.models.kernels.build import cpu_target

try:
    from tgis.models.kernels import low_rank
    from tgis.models.kernels.grouped_native import grouped_product
    from tgis.models.kernels.native import (
        act,
        act_mul,
        amx_linear,
        argmax,
        attention,
        layer_norm,
        quantize_rows,
        rms_norm,
        rope_store,
        scale_rows_,
    )
    from tgis.models.kernels.replay import replayed

    _DESCRIPTION = f"C kernels ({cpu_target().name})"
except (BuildError, OSError) as error:
    from tgis.models.kernels import low_rank_reference as low_rank  # type: ignore[no-redef]
    from tgis.models.kernels.reference import (
        act,
        act_mul,
        amx_linear,
        argmax,
        attention,
        grouped_product,
        layer_norm,
        quantize_rows,
        replayed,
        rms_norm,
        rope_store,
        scale_rows_,
    )

    _DESCRIPTION = f"PyTorch instead of C kernels: {error}"

__all__ = [
    "act",
    "act_mul",
    "amx_linear",
    "argmax",
    "attention",
    "describe",
    "grouped_product",
    "layer_norm",
    "low_rank",
    "quantize_rows",
    "replayed",
    "rms_norm",
    "rope_store",
    "scale_rows_",
]


def describe() -> str:
    """Which kernels are in use, and why, in one line."""
    return _DESCRIPTION
