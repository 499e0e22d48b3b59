"""The encoder-decoder network of T5's kind, built from a `Seq2SeqSpec`.

Both stacks run over flat batches [T, hidden] without padding, as the decoder-only network does. The
encoder runs once per sequence; what the decoder's cross attention reads of it is kept in rows of a
cache of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tgis.models.attention.rows import operators
from tgis.models.collectives import Exchange, Group
from tgis.models.inputs import NewTokens, Splice, StepInputs, splice
from tgis.models.kv_cache import LayerCache, RowsCache
from tgis.models.lora import Adaptable
from tgis.models.parallel import VocabularyTable
from tgis.models.relative_bias import bias_table
from tgis.models.seq2seq_spec import Seq2SeqSpec
from tgis.models.seq2seq_weights import Seq2SeqWeights

_HALF_MAX = torch.finfo(torch.float16).max - 1000


@dataclass(frozen=True, slots=True, eq=False)
class Caches:
    """Keys and values of decoder tokens, and those that cross attention reads of the encoder's."""

    own: RowsCache
    cross: RowsCache


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    norm: Tensor
    qkv: Adaptable
    out: Adaptable
    mlp_norm: Tensor
    mlp_in: Adaptable
    mlp_out: Adaptable
    cross: "_Cross | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class _Cross:
    norm: Tensor
    q: Adaptable
    kv: Adaptable
    out: Adaptable


class _Scratch(NamedTuple):
    """Keys and values [sequences, heads, longest, head_dim] that nobody needs after a layer."""

    k: Tensor
    v: Tensor


AnyCache = LayerCache | _Scratch


class Seq2Seq:
    """A loaded network: `encode` once per sequence, then `decode` step by step."""

    def __init__(
        self, spec: Seq2SeqSpec, weights: Seq2SeqWeights, group: Group, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.group = group
        self._ops = operators(dtype)
        self._head = weights.head()  # first: the largest, while memory is free
        embedding = weights.embedding()
        self._embedding = VocabularyTable(embedding, group.shard, spec.vocab_size, dtype)
        self._encoder = [
            _load_block(weights, f"encoder.block.{i}") for i in range(spec.num_encoder_layers)
        ]
        self._decoder = [
            _load_block(weights, f"decoder.block.{i}") for i in range(spec.num_decoder_layers)
        ]
        table = partial(bias_table, max_distance=spec.max_distance)
        self._encoder_bias = table(weights.relative_bias("encoder"), bidirectional=True)
        self._decoder_bias = table(weights.relative_bias("decoder"), bidirectional=False)
        self._encoder_norm = weights.norm("encoder.final_layer_norm")
        self._decoder_norm = weights.norm("decoder.final_layer_norm")
        self.num_heads = len(self._encoder_bias)  # of this rank
        self.lora = weights.lora
        weights.finish()

    def encode(
        self,
        slots: Sequence[int],
        inputs: Sequence[Sequence[int]],
        caches: Caches,
        prompts: Sequence[Tensor | None],
        loras: Sequence[int],
    ) -> None:
        """Read whole inputs and keep what the decoder will want of each in its slot.

        Args:
            prompts: the embeddings [n, hidden] of each input's first n tokens, if they are those of
                a soft prompt.
            loras: the address of each input's LoRA adapter; 0: it has none.
        """
        tokens, here = NewTokens(), NewTokens()
        rows = zip(slots, inputs, prompts, loras, strict=True)
        for row, (slot, ids, prompt, lora) in enumerate(rows):
            here.add(row, ids, 0, 0, prompt, lora)
            tokens.add(slot, ids, 0, 0, lora=lora)
        states = self._encoder_states(here, max(map(len, inputs)))
        kept = tokens.inputs(None)
        for block, cache in zip(self._decoder, caches.cross.layers, strict=True):
            assert block.cross is not None
            self._store(block.cross.kv(states, kept.lora), cache, kept, num_heads=0)

    def decode(
        self,
        inputs: StepInputs,
        encoder_len: Tensor,
        caches: Caches,
        splices: Sequence[Splice] = (),
    ) -> Tensor:
        """Compute one step of the decoder and extend its cache.

        Args:
            splices: embeddings of soft prompts, the same on all ranks.
            encoder_len: int32 [S], tokens of each sequence's input.

        Returns:
            Logits after the tokens `inputs.logits_index`, float32 [N, vocab]; on ranks other than
            the first, nothing of use.
        """
        stream = self._embed(inputs, splices)
        addition: Tensor | None = None
        layers = zip(self._decoder, caches.own.layers, caches.cross.layers, strict=True)
        for block, own, cross in layers:
            x = self._norm(stream, block.norm, addition)
            q = self._store(block.qkv(x, inputs.lora), own, inputs, self.num_heads)
            bias = self._decoder_bias
            attended = self._attend(q, own, inputs, inputs.kv_len, bias, causal=True)
            attended = self.group.sum_(block.out(attended, inputs.lora))
            assert block.cross is not None
            x = self._norm(stream, block.cross.norm, attended)
            q = block.cross.q(x, inputs.lora).view(q.shape)
            attended = self._attend(q, cross, inputs, encoder_len, None, causal=False)
            attended = self.group.sum_(block.cross.out(attended, inputs.lora))
            addition = self._mlp(block, self._norm(stream, block.mlp_norm, attended), inputs.lora)
        return self._logits(stream, addition, inputs)

    def exchanges(self, num_encoded: int, num_tokens: int, num_logits: int) -> list[Exchange]:
        """What ranks exchange in a step: both stacks' embeddings and blocks, then logits.

        Args:
            num_encoded: tokens of the encoder; 0 if it has nothing to do.
            num_tokens: of the decoder.
        """

        def stack(tokens: int, num_attentions: int, num_layers: int) -> list[Exchange]:
            attended = Exchange((tokens, self.spec.hidden_size), self.dtype)
            block = [attended] * num_attentions + [attended._replace(dtype=torch.float32)]
            return [attended, *(block * num_layers)]

        encoder = stack(num_encoded, 1, self.spec.num_encoder_layers) if num_encoded else []
        decoder = stack(num_tokens, 2, self.spec.num_decoder_layers)
        logits = Exchange((num_logits, self.spec.vocab_size), torch.float32)
        return [*encoder, *decoder, logits]

    def _encoder_states(self, tokens: NewTokens, longest: int) -> Tensor:
        """[T, hidden] of whole inputs, which lie in slots 0, 1, ... of a scratch cache."""
        inputs = tokens.inputs(None)
        shape = (len(inputs.slots), self.num_heads, longest, self.spec.head_dim)
        scratch = _Scratch(*(torch.empty(shape, dtype=self.dtype) for _ in range(2)))
        stream = self._embed(inputs, tokens.splices)
        addition: Tensor | None = None
        for block in self._encoder:
            x = self._norm(stream, block.norm, addition)
            q = self._store(block.qkv(x, inputs.lora), scratch, inputs, self.num_heads)
            bias = self._encoder_bias
            attended = self._attend(q, scratch, inputs, inputs.kv_len, bias, causal=False)
            attended = self.group.sum_(block.out(attended, inputs.lora))
            addition = self._mlp(block, self._norm(stream, block.mlp_norm, attended), inputs.lora)
        return self._norm(stream, self._encoder_norm, addition)

    def _embed(self, inputs: StepInputs, splices: Sequence[Splice]) -> Tensor:
        x = self.group.sum_(self._embedding(inputs.token_ids))
        splice(x, splices)
        return x

    def _norm(self, stream: Tensor, weight: Tensor, addition: Tensor | None) -> Tensor:
        """Norm of stream + addition, which the stream becomes."""
        y: Tensor
        if addition is not None and self.dtype == torch.float16:
            stream.add_(addition).clamp_(-_HALF_MAX, _HALF_MAX)
            addition = None
        if addition is None:
            y = self._ops.rms_norm(stream, weight, self.spec.norm_eps)
        else:
            y = self._ops.rms_norm(addition, weight, self.spec.norm_eps, residual=stream)
        return y

    def _store(self, qkv: Tensor, cache: AnyCache, inputs: StepInputs, num_heads: int) -> Tensor:
        q: Tensor = self._ops.rope_store(
            qkv,
            None,
            None,
            cache.k,
            cache.v,
            inputs.token_slot,
            inputs.positions,
            num_heads,
            self.num_heads,
        )
        return q

    def _attend(
        self,
        q: Tensor,
        cache: AnyCache,
        inputs: StepInputs,
        kv_len: Tensor,
        bias: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """Attention without a scale, as T5 has it."""
        out: Tensor = self._ops.attention(
            q, cache.k, cache.v, inputs.slots, inputs.q_start, kv_len, 1.0, bias=bias, causal=causal
        )
        return out

    def _mlp(self, block: _Block, x: Tensor, lora: Tensor | None) -> Tensor:
        activate = self._ops.act_mul if self.spec.gated_mlp else self._ops.act
        inner: Tensor = activate(block.mlp_in(x, lora), self.spec.activation)
        return self.group.sum_(block.mlp_out(inner.float(), lora)).to(self.dtype)

    def _logits(self, stream: Tensor, addition: Tensor | None, inputs: StepInputs) -> Tensor:
        index, lora = inputs.logits_index, inputs.lora
        if len(index) < len(stream):
            lora = None if lora is None else lora.index_select(0, index)
            stream = stream.index_select(0, index)
            addition = None if addition is None else addition.index_select(0, index)
        if len(index):
            x = self._norm(stream, self._decoder_norm, addition)
            if self.spec.scaled_logits:
                x = x * self.spec.hidden_size**-0.5
            logits = self._head(x, lora)
        else:
            logits = torch.empty(0, self._embedding.num_rows)
        return self.group.gather(logits, self.spec.vocab_size)


def _load_block(weights: Seq2SeqWeights, block: str) -> _Block:
    """A block of the encoder, or one of the decoder with its cross attention."""
    is_decoder = block.startswith("decoder")
    attention = f"{block}.layer.0.SelfAttention"
    last = f"{block}.layer.{2 if is_decoder else 1}"
    return _Block(
        norm=weights.norm(f"{block}.layer.0.layer_norm"),
        qkv=weights.projection(attention, "qkv"),
        out=weights.attention_out(attention),
        cross=_load_cross(weights, f"{block}.layer.1") if is_decoder else None,
        mlp_norm=weights.norm(f"{last}.layer_norm"),
        mlp_in=weights.mlp_in(f"{last}.DenseReluDense"),
        mlp_out=weights.mlp_out(f"{last}.DenseReluDense"),
    )


def _load_cross(weights: Seq2SeqWeights, layer: str) -> _Cross:
    attention = f"{layer}.EncDecAttention"
    return _Cross(
        norm=weights.norm(f"{layer}.layer_norm"),
        q=weights.projection(attention, "q"),
        kv=weights.projection(attention, "kv"),
        out=weights.attention_out(attention),
    )
