"""Which engine serves a model: `DEPLOYMENT_FRAMEWORK` names -> loaders."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tgis.config import Config
from tgis.engines import native
from tgis.engines.base import Engine
from tgis.errors import ConfigError, ModelError
from tgis.hub.safetensors import Progress
from tgis.models.dtypes import choose_dtype
from tgis.models.families import FAMILIES
from tgis.types import ModelFiles

log = logging.getLogger(__name__)

Load = Callable[[Path, Mapping[str, Any], torch.dtype, Progress | None], Engine]
"""(model directory, config.json, dtype, progress) -> engine, its cache not yet allocated."""

ENGINES: dict[str, Load] = {
    "tgis_native": native.load,
}


def load_engine(config: Config, files: ModelFiles, progress: Progress | None = None) -> Engine:
    """Load the model into the engine that the settings and the model's family choose.

    Raises:
        ConfigError: an unknown engine.
        ModelError: no engine serves such a model, or its files are wrong.
    """
    name = choose_engine(config.deployment_framework, files.model_type)
    dtype, reason = choose_dtype(config.dtype)
    log.info("Loading %s with engine %s as %s: %s", files.name, name, dtype, reason)
    return ENGINES[name](Path(files.path), files.config, dtype, progress)


def choose_engine(framework: str | None, model_type: str) -> str:
    """The name of the engine.

    Args:
        framework: `DEPLOYMENT_FRAMEWORK`; unset means native where the model's family is known.

    Raises:
        ConfigError: an unknown engine.
        ModelError: no engine serves such a model.
    """
    if framework and framework not in ENGINES:
        known = ", ".join(ENGINES)
        raise ConfigError(f"DEPLOYMENT_FRAMEWORK = {framework} is unknown (one of {known})")
    if framework:
        return framework
    if model_type in FAMILIES:
        return "tgis_native"
    raise ModelError(
        f"no engine serves model_type {model_type!r} (tgis_native: {', '.join(sorted(FAMILIES))})"
    )
