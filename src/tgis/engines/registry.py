"""Which engine serves a model: `DEPLOYMENT_FRAMEWORK` names -> engines.

An engine is an entry point: a name, and the place of a function that loads a model. Those of this
package stand in the table; other packages add theirs to the group `tgis.engines`, under names of
their own. Nothing of an engine is imported before it is chosen.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch

from tgis.config import Config
from tgis.config.model import ENGINE_GROUP
from tgis.engines.base import Engine
from tgis.engines.fms_families import FAMILIES as FMS_FAMILIES
from tgis.engines.placement import HOST, Placement, choose_placement, prepare_card
from tgis.errors import ConfigError, ModelError
from tgis.hub.safetensors import Progress
from tgis.models.collectives import Group
from tgis.models.dtypes import choose_dtype
from tgis.models.families import FAMILIES
from tgis.models.families.t5 import SEQ2SEQ_FAMILIES
from tgis.types import ModelFiles

log = logging.getLogger(__name__)

Load = Callable[[Config, ModelFiles, torch.dtype, Progress | None], Engine]
"""(settings, model, dtype, progress) -> engine, its cache not yet allocated."""

NATIVE = "tgis_native"
GENERAL = "hf_transformers"  # for whatever native does not know
NATIVE_TYPES = frozenset({*FAMILIES, *SEQ2SEQ_FAMILIES})

ENGINES: dict[str, str] = {
    NATIVE: "tgis.engines.registry:load_native",
    GENERAL: "tgis.engines.hf:load",
    "hf_accelerate": "tgis.engines.hf:load",
    "hf_optimum_bt": "tgis.engines.hf:load",
    "hf_optimum_ort": "tgis.engines.ort:load",
    "ibm_fms": "tgis.engines.fms:load",
}

# Engines that serve some families only.
_ONLY: dict[str, Collection[str]] = {NATIVE: NATIVE_TYPES, "ibm_fms": FMS_FAMILIES}
# Engines whose files or numbers are not the native one's, so that it cannot stand in for them.
_WHOLE = ("hf_optimum_ort", "ibm_fms")


def load_engine(
    config: Config,
    files: ModelFiles,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Engine:
    """Load the model into the engine that the settings and the model's family choose.

    Args:
        group: the ranks that share the model, if it is split; then this rank's part is loaded.

    Raises:
        ConfigError: an engine that is unknown or not installed properly.
        ModelError: the engine does not serve such a model, or its files are wrong.
    """
    framework = config.deployment_framework
    if group is not None:
        framework = _splitting(framework, files.model_type, group.shard.world_size)
    entry = choose_engine(framework, files.model_type)
    on_card = entry.name == NATIVE and _placement(config, files).device.type == "cuda"
    dtype, reason = choose_dtype(config.dtype, "cuda" if on_card else "cpu")
    log.info("Loading %s with engine %s as %s: %s", files.name, entry.name, dtype, reason)
    if group is not None:
        return load_native(config, files, dtype, progress, group)
    if config.quantize and entry.name in set(ENGINES) - {NATIVE}:
        raise ConfigError(
            f"QUANTIZE = {config.quantize}: engine {entry.name} does not quantise weights;"
            f" {NATIVE} does, for models of types {', '.join(sorted(NATIVE_TYPES))}"
        )
    try:
        load: Load = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"DEPLOYMENT_FRAMEWORK = {entry.name}: {entry.value} cannot be imported: {error}"
        ) from error
    return load(config, files, dtype, progress)


def choose_engine(framework: str | None, model_type: str) -> EntryPoint:
    """The entry point of the engine.

    Args:
        framework: `DEPLOYMENT_FRAMEWORK`; unset means native where the model's family is known.

    Raises:
        ConfigError: there is no such engine.
        ModelError: the native engine is asked for a family that it does not know.
    """
    known = model_type in NATIVE_TYPES
    if framework is None:
        framework = NATIVE if known else GENERAL
    engines = _engines()
    if framework not in engines:
        possible = ", ".join(_possible(engines, model_type))
        raise ConfigError(
            f"DEPLOYMENT_FRAMEWORK = {framework}: this installation has no such engine;"
            f" a model of type {model_type} can be served by {possible}"
        )
    if framework == NATIVE and not known:
        possible = ", ".join(_possible(engines, model_type))
        raise ModelError(
            f"DEPLOYMENT_FRAMEWORK = {NATIVE} does not serve models of type {model_type} (only"
            f" {', '.join(sorted(NATIVE_TYPES))}); others are served by {possible}"
        )
    if known and framework != NATIVE:
        log.warning("%s is the recommended engine for models of type %s", NATIVE, model_type)
    return engines[framework]


def _possible(engines: Iterable[str], model_type: str) -> list[str]:
    """Engines that may serve such a model."""
    return [name for name in engines if model_type in _ONLY.get(name, (model_type,))]


def _splitting(framework: str | None, model_type: str, num_ranks: int) -> str:
    """The engine that splits models, which only the native one does.

    Raises:
        ModelError: it does not serve such a model.
    """
    if model_type not in NATIVE_TYPES:
        raise ModelError(
            f"num_shard = {num_ranks}: models of type {model_type} cannot be split (only"
            f" {', '.join(sorted(NATIVE_TYPES))}); set num_shard to 1"
        )
    if framework in _WHOLE:
        raise ModelError(
            f"num_shard = {num_ranks}: DEPLOYMENT_FRAMEWORK = {framework} does not split models;"
            f" set num_shard to 1, or DEPLOYMENT_FRAMEWORK to {NATIVE}"
        )
    if framework not in (None, NATIVE):
        log.warning(
            "Using deployment engine %s rather than %s because more than one shard is configured",
            NATIVE,
            framework,
        )
    return NATIVE


def load_native(
    config: Config,
    files: ModelFiles,
    dtype: torch.dtype,
    progress: Progress | None,
    group: Group | None = None,
) -> Engine:
    """Load a model, or a rank's part of it, into the native engine.

    Raises:
        ModelError: the family or an option of it is not supported, or the files are wrong.
        ConfigError: weights cannot be quantised as the settings say.
    """
    from tgis.engines import native, native_seq2seq

    what = (Path(files.path), files.config, dtype, progress, group)
    how = (config.quantize, files.quantization)
    placement = _placement(config, files)
    if group is not None:
        group.device = placement.device.type
    if placement.device.type == "cuda":
        prepare_card(config, placement.device)
    if files.model_type in SEQ2SEQ_FAMILIES:
        return native_seq2seq.load(*what, *how)
    return native.load(*what, *how, placement)


def _placement(config: Config, files: ModelFiles) -> Placement:
    """Where a model of the native engine computes."""
    if files.model_type not in SEQ2SEQ_FAMILIES:
        return choose_placement(config)
    asked = {"DEVICE": config.device, "KV_LAYOUT": config.kv_layout, "ATTENTION": config.attention}
    for name, value in asked.items():
        if value not in (None, "cpu", "rows"):
            raise ConfigError(f"{name} = {value}: not for models of type {files.model_type}")
    return HOST


def _engines() -> dict[str, EntryPoint]:
    own = {name: EntryPoint(name, value, ENGINE_GROUP) for name, value in ENGINES.items()}
    others = {entry.name: entry for entry in entry_points(group=ENGINE_GROUP)}
    return own | {name: entry for name, entry in others.items() if name not in own}
