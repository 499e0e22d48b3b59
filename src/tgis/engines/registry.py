"""Which engine serves a model: `DEPLOYMENT_FRAMEWORK` names -> loaders."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tgis.engines import native
from tgis.engines.base import Engine
from tgis.errors import ConfigError, ModelError
from tgis.hub.safetensors import Progress
from tgis.models.families import FAMILIES

Load = Callable[[Path, Mapping[str, Any], torch.dtype, Progress | None], Engine]
"""(model directory, config.json, dtype, progress) -> engine, its cache not yet allocated."""

ENGINES: dict[str, Load] = {
    "tgis_native": native.load,
}


def choose_engine(framework: str | None, config: Mapping[str, Any]) -> Load:
    """The loader for a setting and a model.

    Args:
        framework: `DEPLOYMENT_FRAMEWORK`; unset means native where the model's family is known.
        config: the model's `config.json`.

    Raises:
        ConfigError: an unknown engine.
        ModelError: no engine serves such a model.
    """
    if framework:
        if framework not in ENGINES:
            known = ", ".join(ENGINES)
            raise ConfigError(f"DEPLOYMENT_FRAMEWORK = {framework} is unknown (one of {known})")
        return ENGINES[framework]
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return native.load
    raise ModelError(
        f"no engine serves model_type {model_type!r} (tgis_native: {', '.join(sorted(FAMILIES))})"
    )
