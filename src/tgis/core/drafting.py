"""Putting speculative decoding together: what the settings ask for, as far as the engine can."""

import logging

import msgspec
import torch

from tgis.config import Config
from tgis.config.speculation import OFF
from tgis.core.draft_model import DraftModel
from tgis.core.drafts import Drafter, PromptLookup
from tgis.core.speculation import NO_SPECULATION, Speculation
from tgis.core.step_costs import measure
from tgis.engines.base import CacheShape, Engine, EngineCaps
from tgis.engines.registry import load_native
from tgis.errors import ConfigError, ModelError
from tgis.models.families import FAMILIES
from tgis.types import ModelFiles

log = logging.getLogger(__name__)

# Tokens of a step up to which each is rounded as it would be alone, where kernels are our own; of
# weights of few bits that are scaled afterwards, and of others.
SCALED_TOKENS, MOST_TOKENS = 32, 128


class Drafting:
    """Made in two parts, because a draft model takes memory before the rest of it is dealt out.

    Args:
        engine: of the model that is served.
        files: of the draft model that `--speculate` names; None = it names none.
        length: tokens of the longest sequence.
        is_quantised: the model's files are.

    Raises:
        ConfigError: the engine cannot verify drafts, or the draft model cannot be loaded.

    Attributes:
        reserved_bytes: memory for the draft model's keys and values.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        files: ModelFiles | None,
        length: int,
        is_quantised: bool = False,
    ) -> None:
        is_scaled = is_quantised or config.quantize in ("int8", "int4")
        self._most_step_tokens = SCALED_TOKENS if is_scaled else MOST_TOKENS
        self._config = config
        self._engine = engine
        self._length = length
        self._model: tuple[Engine, CacheShape] | None = None
        self.reserved_bytes = 0
        if config.speculate != OFF and not engine.caps.verifies_drafts:
            raise ConfigError(
                f"--speculate={config.speculate}: engine {engine.caps.name} cannot verify drafts"
                f" for this model; only decoders served by tgis_native can; set it to {OFF}"
            )
        if files is not None:
            model = _load(config, files, engine.caps)
            length = min(length, model.caps.max_positions or length)
            shape = CacheShape(config.speculate_max_batch_size, length)
            model.allocate(shape)
            self.reserved_bytes = shape.num_slots * length * model.caps.kv_bytes_per_token
            self._model = model, shape

    def speculation(self) -> Speculation:
        """The second part; the cache of the engine must be allocated."""
        config = self._config
        if config.speculate == OFF:
            return NO_SPECULATION
        drafter: Drafter = PromptLookup()
        if self._model is not None:
            model, shape = self._model
            seconds = measure(model, shape.slot_tokens, "the draft model").of(1)
            drafter = DraftModel(model, shape, self._engine.caps.vocab_size, seconds)
        costs = measure(self._engine, self._length, "the model")
        log.info(
            "speculative decoding by %s: up to %d tokens for each of up to %d sequences",
            config.speculate,
            config.speculate_tokens,
            config.speculate_max_batch_size,
        )
        most = config.speculate_tokens, config.speculate_max_batch_size, self._most_step_tokens
        return Speculation(drafter, costs, *most)


def _load(config: Config, files: ModelFiles, caps: EngineCaps) -> Engine:
    """The draft model, in the type of the one it drafts for."""
    if caps.kv_layout != "rows":
        raise ConfigError(
            f"--speculate={config.speculate}: there are draft models on the CPU only;"
            " prompt-lookup works here"
        )
    if files.model_type not in FAMILIES:
        raise ConfigError(
            f"--speculate={config.speculate}: tgis_native does not serve models of type"
            f" {files.model_type}"
        )
    plain = msgspec.structs.replace(config, quantize=None)
    try:
        return load_native(plain, files, getattr(torch, caps.dtype), None)
    except (ModelError, ConfigError) as error:
        raise ConfigError(f"--speculate={config.speculate}: {error}") from None
