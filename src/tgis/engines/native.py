"""The native engine: tgis's own networks on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgis.adapters.load import Adapter
from tgis.adapters.prompts import SoftPrompt
from tgis.engines.allocations import failed_allocations
from tgis.engines.base import CacheShape, EngineCaps
from tgis.engines.native_files import opened
from tgis.engines.plan import StepPlan
from tgis.errors import ConfigError
from tgis.hub.safetensors import Progress
from tgis.models.collectives import Exchange, Group
from tgis.models.decoder import Decoder, Step
from tgis.models.families import read_spec
from tgis.models.inputs import NewTokens
from tgis.models.kv_cache import RowsCache, page_tokens
from tgis.models.lora import LoraAdapter
from tgis.models.model_config import ModelConfig
from tgis.models.rotary import rotary_table
from tgis.models.spec import Rotary
from tgis.models.weights import Weights
from tgis.types import ModelKind


def load(
    model_dir: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    progress: Progress | None = None,
    group: Group | None = None,
    quantize: str | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> "NativeEngine":
    """Load a decoder-only model of a known family.

    Args:
        model_dir: holds the safetensors files.
        config: the model's `config.json`.
        dtype: of weights, arithmetic and cache.
        progress: told of bytes loaded and bytes in all.
        group: the ranks among which the model is split; None = it is not.
        quantize: `QUANTIZE`, how weights are quantised that are stored as floats.
        quantization: how the stored weights are quantised; what `config` says of it unless given.

    Raises:
        ModelError: the family or an option of it is not supported, or the files are wrong.
        ConfigError: weights cannot be quantised so.
    """
    spec, names = read_spec(ModelConfig(config))
    group = group or Group()
    files = opened(model_dir, config, dtype, progress, quantize, quantization)
    with files as (checkpoint, packing):
        weights = Weights(checkpoint, spec, names, group.shard, dtype, packing)
        return NativeEngine(Decoder(spec, names, weights, group, dtype))


class NativeEngine:
    """A decoder-only network and its key/value cache."""

    def __init__(self, decoder: Decoder) -> None:
        spec = decoder.spec
        first, last = decoder.group.shard.kv_heads(spec)
        self._decoder = decoder
        self._num_kv_heads = last - first
        self._cache: RowsCache | None = None
        self._step: Step | None = None
        self._prompts: dict[int, SoftPrompt] = {}  # by handle
        self._loras: dict[int, LoraAdapter] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.caps = EngineCaps(
            name="tgis_native",
            kind=ModelKind.DECODER_ONLY,
            kv_layout="rows",
            chunked_prefill=True,
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            kv_bytes_per_token=2
            * spec.num_layers
            * self._num_kv_heads
            * spec.head_dim
            * decoder.dtype.itemsize,
            dtype=str(decoder.dtype).removeprefix("torch."),
            kv_granule=page_tokens(spec.head_dim, decoder.dtype),
            soft_prompt_size=spec.hidden_size,
            lora_targets=decoder.lora.targets,
            verifies_drafts=True,
        )

    def allocate(self, shape: CacheShape) -> None:
        """See `Engine.allocate`.

        Raises:
            ConfigError: slots of more tokens than the model has positions.
        """
        spec, limit = self._decoder.spec, self.caps.max_positions
        if limit is not None and shape.slot_tokens > limit:
            raise ConfigError(
                f"sequences of {shape.slot_tokens} tokens are longer than the model's"
                f" {limit} positions"
            )
        self._cache = RowsCache(
            num_layers=spec.num_layers,
            num_slots=shape.num_slots,
            num_kv_heads=self._num_kv_heads,
            slot_tokens=shape.slot_tokens,
            head_dim=spec.head_dim,
            dtype=self._decoder.dtype,
        )
        self._step = self._decoder.bind(self._cache)
        if isinstance(spec.positions, Rotary):
            self._rotary = rotary_table(spec.positions, shape.slot_tokens)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """See `Engine.forward`."""
        assert self._cache is not None, "allocate comes before forward"
        assert self._step is not None
        exchanges: list[Exchange] = []
        if self._decoder.group.shard.world_size > 1:
            exchanges = self._decoder.exchanges(plan.num_tokens, plan.num_logits)
        with self._decoder.group.step(exchanges), failed_allocations():
            for copy in plan.copies:
                self._cache.copy(copy.source, copy.target, copy.num_tokens)
            tokens = NewTokens()
            for row in plan.rows:
                prompt = self._prompts[row.prompt].decoder if row.prompt else None
                lora = self._loras[row.lora].address if row.lora else 0
                tokens.add(row.slot, row.token_ids, row.start, row.num_logits, prompt, lora)
            return self._step(tokens.inputs(self._rotary), tokens.splices)

    def attach(self, handle: int, adapter: Adapter) -> None:
        """See `Engine.attach`."""
        if isinstance(adapter, SoftPrompt):
            self._prompts[handle] = adapter
        else:
            with failed_allocations():
                self._loras[handle] = self._decoder.lora.attach(adapter.pairs)

    def detach(self, handle: int) -> None:
        """See `Engine.detach`."""
        self._prompts.pop(handle, None)
        self._loras.pop(handle, None)

    def release(self, slots: Sequence[int]) -> None:
        """See `Engine.release`."""
        if self._cache is not None:
            self._cache.release(slots)

    def close(self) -> None:
        """See `Engine.close`."""
        self._cache = None
        self._step = None
        self._rotary = None
