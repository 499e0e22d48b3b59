"""The native engine: tgis's own networks, on the CPU or on a CUDA device."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgis.adapters.load import Adapter
from tgis.adapters.prompts import SoftPrompt
from tgis.clib import BuildError
from tgis.engines.allocations import failed_allocations
from tgis.engines.base import CacheShape, EngineCaps
from tgis.engines.graphs import Capture, DecodeGraphs, batch_sizes, cuda_capture
from tgis.engines.native_files import opened
from tgis.engines.placement import HOST, Placement
from tgis.engines.plan import StepPlan
from tgis.errors import ConfigError
from tgis.hub.safetensors import Progress
from tgis.models.attention.backends import choose_backend, needs_of
from tgis.models.collectives import Exchange, Group
from tgis.models.decoder import Decoder, Step
from tgis.models.families import read_spec
from tgis.models.inputs import NewTokens
from tgis.models.kv_cache import BlocksCache, RowsCache, page_tokens
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
    placement: Placement = HOST,
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
        placement: where it computes, with which layout of the cache.

    Raises:
        ModelError: the family or an option of it is not supported, or the files are wrong.
        ConfigError: weights cannot be quantised so, or a back end cannot be used here.
    """
    spec, names = read_spec(ModelConfig(config))
    group = group or Group()
    device, backend = placement.device, None
    if placement.layout == "blocks":
        backend = choose_backend(placement.attention, needs_of(spec, dtype, device))
    files = opened(model_dir, config, dtype, progress, quantize, quantization, device)
    with files as (checkpoint, packing):
        weights = Weights(checkpoint, spec, names, group.shard, dtype, packing, device)
        attend = None if backend is None else backend.attend
        decoder = Decoder(spec, names, weights, group, dtype, attend, device)
        engine = NativeEngine(decoder, 0 if backend is None else backend.block_tokens)
        if backend is not None and backend.replays and device.type == "cuda":
            engine.capture = cuda_capture()
        return engine


class NativeEngine:
    """A decoder-only network and its key/value cache.

    Args:
        block_tokens: tokens of a block of its cache; 0 = the cache is laid out in rows.

    Attributes:
        capture: by which decoding steps are captured when the cache is allocated; None = not.
    """

    def __init__(self, decoder: Decoder, block_tokens: int = 0) -> None:
        spec = decoder.spec
        first, last = decoder.group.shard.kv_heads(spec)
        self._decoder = decoder
        self._num_kv_heads = last - first
        self.capture: Capture | None = None
        self._graphs: DecodeGraphs | None = None
        self._block_tokens = block_tokens
        self._cache: RowsCache | BlocksCache | None = None
        self._step: Step | None = None
        self._prompts: dict[int, SoftPrompt] = {}  # by handle
        self._loras: dict[int, LoraAdapter] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.caps = EngineCaps(
            name="tgis_native",
            kind=ModelKind.DECODER_ONLY,
            kv_layout="blocks" if block_tokens else "rows",
            chunked_prefill=True,
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            kv_bytes_per_token=2
            * spec.num_layers
            * self._num_kv_heads
            * spec.head_dim
            * decoder.dtype.itemsize,
            dtype=str(decoder.dtype).removeprefix("torch."),
            kv_granule=block_tokens or page_tokens(spec.head_dim, decoder.dtype),
            device=decoder.device.type,
            soft_prompt_size=spec.hidden_size,
            lora_targets=decoder.lora.targets,
            verifies_drafts=True,
        )

    def allocate(self, shape: CacheShape) -> None:
        """See `Engine.allocate`.

        Raises:
            ConfigError: sequences of more tokens than the model has positions.
        """
        spec, limit = self._decoder.spec, self.caps.max_positions
        longest = shape.longest or shape.slot_tokens
        if limit is not None and longest > limit:
            raise ConfigError(
                f"sequences of {longest} tokens are longer than the model's {limit} positions"
            )
        self._step = self._cache = self._graphs = None  # what was there goes first
        self._cache = self._new_cache(shape)
        self._step = self._decoder.bind(self._cache)
        if isinstance(spec.positions, Rotary):
            cos, sin = rotary_table(spec.positions, longest)
            self._rotary = cos.to(self._decoder.device), sin.to(self._decoder.device)
        is_alone = self._decoder.group.shard.world_size == 1
        if self.capture is not None and shape.max_running and is_alone:
            self._capture(self.capture, shape)

    @torch.inference_mode()
    def _capture(self, capture: Capture, shape: CacheShape) -> None:
        step = self._step
        assert step is not None
        self._graphs = DecodeGraphs(
            lambda inputs: step(inputs, ()),
            spare_block=shape.num_slots,
            block_tokens=self._block_tokens,
            longest=shape.longest,
            rotary=self._rotary,
            device=self._decoder.device,
        )
        self._graphs.capture(batch_sizes(shape.max_running), capture)

    def _new_cache(self, shape: CacheShape) -> RowsCache | BlocksCache:
        spec, dtype = self._decoder.spec, self._decoder.dtype
        heads = (self._num_kv_heads, shape.slot_tokens, spec.head_dim)
        if not self._block_tokens:
            return RowsCache(spec.num_layers, shape.num_slots, *heads, dtype)
        assert shape.slot_tokens == self._block_tokens
        num_blocks = shape.num_slots + 1  # one to spare, for rows that fill a batch up
        return BlocksCache(spec.num_layers, num_blocks, *heads, dtype, self._decoder.device)

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
                assert isinstance(self._cache, RowsCache), "blocks are shared, not copied"
                self._cache.copy(copy.source, copy.target, copy.num_tokens)
            tokens = NewTokens(self._block_tokens, self._decoder.device)
            for row in plan.rows:
                prompt = self._prompts[row.prompt].decoder if row.prompt else None
                lora = self._loras[row.lora].address if row.lora else 0
                new = (row.slot, row.token_ids, row.start, row.num_logits)
                tokens.add(*new, prompt, lora, row.block_table)
            if self._graphs is not None and self._graphs.takes(plan) and not tokens.splices:
                return self._graphs.run(tokens, len(plan.rows))
            return self._step(tokens.inputs(self._rotary), tokens.splices)

    def compile(self, directory: Path) -> bool:
        """Let compiled code compute the steps from now on, over the cache that is allocated.

        Args:
            directory: where compiled code is kept between starts.

        Returns:
            Whether it was compiled now, and not found there.

        Raises:
            BuildError: it cannot be had.
        """
        from tgis.models.compiled import compiled  # defines operators that nobody else needs

        assert self._cache is not None, "allocate comes before compile"
        if self._block_tokens:
            raise BuildError("a network with keys and values in blocks is not compiled")
        network, is_new = compiled(self._decoder, directory)
        self._step = self._decoder.bind(self._cache, network)
        return is_new

    def uncompile(self) -> None:
        """Let the network compute the steps as it was loaded."""
        assert self._cache is not None
        self._step = self._decoder.bind(self._cache)

    def deviation(self, plan: StepPlan) -> float:
        """How far a step's logits are from those of the network as it was loaded.

        Returns:
            The largest difference, as a share of the largest logit.
        """
        step, logits = self._step, self.forward(plan).clone()
        self.uncompile()
        expected = self.forward(plan)
        self._step = step
        if not expected.numel():
            return 0.0
        return float((logits - expected).abs().max() / expected.abs().max())

    def attach(self, handle: int, adapter: Adapter) -> None:
        """See `Engine.attach`."""
        if isinstance(adapter, SoftPrompt):
            decoder = adapter.decoder
            here = None if decoder is None else decoder.to(self._decoder.device)
            self._prompts[handle] = SoftPrompt(here)
        else:
            with failed_allocations():
                self._loras[handle] = self._decoder.lora.attach(adapter.pairs)

    def detach(self, handle: int) -> None:
        """See `Engine.detach`."""
        self._prompts.pop(handle, None)
        self._loras.pop(handle, None)

    def release(self, slots: Sequence[int]) -> None:
        """See `Engine.release`."""
        if isinstance(self._cache, RowsCache):
            self._cache.release(slots)

    def close(self) -> None:
        """See `Engine.close`."""
        self._cache = None
        self._step = None
        self._rotary = None
