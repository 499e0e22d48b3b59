"""A model's files while a native engine is loaded from them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tgis.engines.host_memory import trim
from tgis.engines.huge_pages import use_huge_pages
from tgis.hub.safetensors import Checkpoint, Progress, open_checkpoint
from tgis.models import kernels
from tgis.models.inputs import CPU
from tgis.models.packing import Packing, read_packing

log = logging.getLogger(__name__)


@contextmanager
def opened(
    model_dir: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    progress: Progress | None,
    quantize: str | None,
    quantization: Mapping[str, Any] | None,
    device: torch.device = CPU,
) -> Iterator[tuple[Checkpoint, Packing]]:
    """The stored weights, and how layers are made of them; puts memory in order afterwards.

    Args: those of `native.load`.
    """
    log.info("%s", kernels.describe())
    checkpoint = open_checkpoint(model_dir, progress)
    try:
        quantization = quantization or config.get("quantization_config")
        yield checkpoint, read_packing(quantize, dtype, checkpoint, quantization, device)
    finally:
        checkpoint.close()
        trim()
        use_huge_pages()
