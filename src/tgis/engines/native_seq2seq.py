"""The native engine for encoder-decoder models of T5's kind."""

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
from tgis.engines.plan import Row, StepPlan
from tgis.hub.safetensors import Progress
from tgis.models.collectives import Group
from tgis.models.families.t5 import read_seq2seq_spec
from tgis.models.inputs import NewTokens
from tgis.models.kv_cache import RowsCache, page_tokens
from tgis.models.lora import LoraAdapter
from tgis.models.model_config import ModelConfig
from tgis.models.seq2seq import Caches, Seq2Seq
from tgis.models.seq2seq_weights import Seq2SeqWeights
from tgis.types import ModelKind


def load(
    model_dir: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    progress: Progress | None = None,
    group: Group | None = None,
    quantize: str | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> "NativeSeq2SeqEngine":
    """Load an encoder-decoder model of a known family; arguments and errors as `native.load`."""
    spec = read_seq2seq_spec(ModelConfig(config))
    group = group or Group()
    files = opened(model_dir, config, dtype, progress, quantize, quantization)
    with files as (checkpoint, packing):
        weights = Seq2SeqWeights(checkpoint, spec, group.shard, dtype, packing)
        return NativeSeq2SeqEngine(Seq2Seq(spec, weights, group, dtype))


class NativeSeq2SeqEngine:
    """An encoder-decoder network and its caches.

    A row that starts at position 0 carries the input in `encoder_ids`; it is encoded in that step.
    """

    def __init__(self, network: Seq2Seq) -> None:
        spec = network.spec
        self._network = network
        self._caches: Caches | None = None
        self._encoder_len: dict[int, int] = {}  # by slot
        self._prompts: dict[int, SoftPrompt] = {}  # by handle
        self._loras: dict[int, LoraAdapter] = {}
        self.caps = EngineCaps(
            name="tgis_native",
            kind=ModelKind.ENCODER_DECODER,
            kv_layout="rows",
            chunked_prefill=True,
            vocab_size=spec.vocab_size,
            max_positions=None,
            kv_bytes_per_token=2
            * spec.num_decoder_layers
            * network.num_heads
            * spec.head_dim
            * network.dtype.itemsize,
            dtype=str(network.dtype).removeprefix("torch."),
            kv_granule=page_tokens(spec.head_dim, network.dtype),
            soft_prompt_size=spec.hidden_size,
            lora_targets=network.lora.targets,
        )

    def allocate(self, shape: CacheShape) -> None:
        """See `Engine.allocate`; inputs and outputs have rows of their own, each of full length."""
        self._caches = Caches(self._rows(shape), self._rows(shape))

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """See `Engine.forward`."""
        assert self._caches is not None, "allocate comes before forward"
        assert not plan.copies, "what a decoder has computed depends on its input"
        new = [row for row in plan.rows if row.start == 0]
        num_encoded = sum(len(row.encoder_ids or []) for row in new)
        num_tokens = sum(len(row.token_ids) for row in plan.rows)
        exchanges = self._network.exchanges(num_encoded, num_tokens, plan.num_logits)
        with self._network.group.step(exchanges), failed_allocations():
            self._encode(new, self._caches)
            tokens = NewTokens()
            for row in plan.rows:
                prompt = self._prompts[row.prompt].decoder if row.prompt else None
                lora = self._address(row)
                tokens.add(row.slot, row.token_ids, row.start, row.num_logits, prompt, lora)
            lengths = [self._encoder_len[row.slot] for row in plan.rows]
            encoder_len = torch.tensor(lengths, dtype=torch.int32)
            inputs = tokens.inputs(None)
            return self._network.decode(inputs, encoder_len, self._caches, tokens.splices)

    def attach(self, handle: int, adapter: Adapter) -> None:
        """See `Engine.attach`."""
        if isinstance(adapter, SoftPrompt):
            self._prompts[handle] = adapter
        else:
            with failed_allocations():
                self._loras[handle] = self._network.lora.attach(adapter.pairs)

    def detach(self, handle: int) -> None:
        """See `Engine.detach`."""
        self._prompts.pop(handle, None)
        self._loras.pop(handle, None)

    def release(self, slots: Sequence[int]) -> None:
        """See `Engine.release`."""
        if self._caches is not None:
            self._caches.own.release(slots)
            self._caches.cross.release(slots)

    def close(self) -> None:
        """See `Engine.close`."""
        self._caches = None

    def _encode(self, rows: list[Row], caches: Caches) -> None:
        if not rows:
            return
        inputs = [row.encoder_ids or [] for row in rows]
        prompts = [self._prompts[row.prompt].encoder if row.prompt else None for row in rows]
        loras = [self._address(row) for row in rows]
        self._network.encode([row.slot for row in rows], inputs, caches, prompts, loras)
        self._encoder_len |= {row.slot: len(ids) for row, ids in zip(rows, inputs, strict=True)}

    def _address(self, row: Row) -> int:
        return self._loras[row.lora].address if row.lora else 0

    def _rows(self, shape: CacheShape) -> RowsCache:
        spec = self._network.spec
        return RowsCache(
            num_layers=spec.num_decoder_layers,
            num_slots=shape.num_slots,
            num_kv_heads=self._network.num_heads,
            slot_tokens=shape.slot_tokens,
            head_dim=spec.head_dim,
            dtype=self._network.dtype,
        )
