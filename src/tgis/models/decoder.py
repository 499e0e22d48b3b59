"""The decoder-only network of every family, built from a `DecoderSpec`.

A step runs over a flat batch of tokens [T, hidden], without padding. What a block adds to the
residual stream is added by the norm that reads the stream next, in one pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from tgis.models import kernels
from tgis.models.attention.blocks import Attend, BlocksAttention
from tgis.models.attention.heads import heads_of
from tgis.models.attention.rows import RowsAttention, operators
from tgis.models.collectives import Exchange, Group
from tgis.models.families.base import TensorNames
from tgis.models.inputs import CPU, Splice, StepInputs, splice
from tgis.models.kv_cache import BlocksCache, LayerCache, RowsCache
from tgis.models.lora import Adaptable
from tgis.models.parallel import VocabularyTable
from tgis.models.spec import DecoderSpec, Learned, Norm, Topology
from tgis.models.weights import NormWeights, Weights

Step = Callable[[StepInputs, Sequence[Splice]], Tensor]
Cache = RowsCache | BlocksCache
Network = Callable[[Tensor, StepInputs, Cache], Tensor]
"""(embeddings [T, hidden], ...) -> [N, this rank's vocabulary rows]: blocks and head."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidualNorm:
    """(stream, addition) -> norm of stream + addition, which the stream becomes, if it is not None.

    Args:
        ops: has the operators.
    """

    ops: ModuleType
    norm: Norm
    weights: NormWeights

    def __call__(self, stream: Tensor, addition: Tensor | None) -> Tensor:
        """[T, hidden], which may change, -> [T, hidden]."""
        x, residual = (stream, None) if addition is None else (addition, stream)
        weights, eps = self.weights, self.norm.eps
        if self.norm.kind == "rms":
            y: Tensor = self.ops.rms_norm(x, weights.weight, eps, residual)
        else:
            y = self.ops.layer_norm(x, weights.weight, weights.bias, eps, residual)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One layer's parameters on this rank."""

    attention_norm: ResidualNorm
    qkv: Adaptable
    attention: RowsAttention | BlocksAttention
    attention_out: Adaptable
    mlp_norm: ResidualNorm | None
    mlp_in: Adaptable
    activation: Callable[[Tensor], Tensor]
    mlp_out: Adaptable
    multiplier: float  # of what the block adds to the stream
    complete: Callable[[Tensor], Tensor]  # sums over the ranks, in place

    def attend(self, x: Tensor, cache: LayerCache, inputs: StepInputs) -> Tensor:
        """Attention, [T, hidden] -> [T, hidden], this rank's part of the sum."""
        attended = self.attention(self.qkv(x, inputs.lora), cache, inputs)
        return self._scaled(self.attention_out(attended, inputs.lora))

    def mlp(self, x: Tensor, inputs: StepInputs) -> Tensor:
        """The MLP, [T, hidden] -> [T, hidden], this rank's part of the sum."""
        inner = self.activation(self.mlp_in(x, inputs.lora))
        return self._scaled(self.mlp_out(inner, inputs.lora))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1.0 else x.mul_(self.multiplier)


class Decoder:
    """A loaded network: the parameters of one rank, and `forward`.

    Args:
        attend: attends over the `blocks` layout; None = the layout is `rows`.
        device: where the parameters are.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        names: TensorNames,
        weights: Weights,
        group: Group,
        dtype: torch.dtype,
        attend: Attend | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.group = group
        ops = operators(dtype, device)
        self.head = weights.head()  # first: the largest, while memory is free
        embedding = weights.embedding()
        self._embedding = VocabularyTable(embedding, group.shard, spec.vocab_size, dtype)
        self._positions = weights.positions()
        self._embedding_norm = None
        if spec.embedding_norm and names.embedding_norm is not None:
            self._embedding_norm = ResidualNorm(
                ops, spec.norm, weights.outer_norm(names.embedding_norm)
            )
        self.blocks = [
            _load_block(spec, names, weights, group, layer, ops, attend)
            for layer in range(spec.num_layers)
        ]
        self._run_block = TOPOLOGIES[spec.topology]
        self.lora = weights.lora
        self.final_norm = ResidualNorm(ops, spec.norm, weights.outer_norm(names.final_norm))
        weights.finish()

    def forward(self, inputs: StepInputs, cache: Cache, splices: Sequence[Splice] = ()) -> Tensor:
        """Compute one step and extend the cache.

        Args:
            splices: embeddings of soft prompts, the same on all ranks.

        Returns:
            Logits after the tokens `inputs.logits_index`, float32 [N, vocab]; on ranks other than
            the first, nothing of use.
        """
        return self._whole(self._network(self._embed(inputs, splices), inputs, cache))

    def bind(self, cache: Cache, network: Network | None = None) -> Step:
        """`forward` on this cache, with its decoding steps recorded and replayed.

        A result is valid until the next call.

        Args:
            network: computes blocks and head instead, in every step; see `compiled`.
        """
        if network is not None:
            run = network
            return lambda inputs, splices: self._whole(
                run(self._embed(inputs, splices), inputs, cache)
            )
        # What ranks exchange cannot be recorded, nor what is not ours.
        if self.group.shard.world_size > 1 or isinstance(cache, BlocksCache):
            return lambda inputs, splices: self.forward(inputs, cache, splices)

        def called(stream: Tensor, *tensors: Tensor | None) -> Tensor:
            return self._network(stream, StepInputs(*tensors), cache)  # type: ignore[arg-type]

        replayed = kernels.replayed(called)

        def step(inputs: StepInputs, splices: Sequence[Splice]) -> Tensor:
            if not inputs.is_repeatable:
                return self.forward(inputs, cache, splices)
            stream = self._embed(inputs, splices)
            key = (len(stream), len(inputs.slots), inputs.lora is not None)
            return self._whole(replayed(key, stream, *inputs.tensors()))

        return step

    def exchanges(self, num_tokens: int, num_logits: int) -> list[Exchange]:
        """What ranks exchange in a step: embeddings, then in every block, then logits."""
        per_block = 2 if self.spec.topology == "sequential" else 1
        stream = Exchange((num_tokens, self.spec.hidden_size), self.dtype)
        logits = Exchange((num_logits, self.spec.vocab_size), torch.float32)
        return [stream] * (1 + per_block * self.spec.num_layers) + [logits]

    def _embed(self, inputs: StepInputs, splices: Sequence[Splice]) -> Tensor:
        x = self._embedding(inputs.token_ids)
        if inputs.lora is not None:
            self.lora.embed_(x, inputs.token_ids, inputs.lora)
        self.group.sum_(x)
        if self.spec.multiplies_prompts:
            splice(x, splices)
        if self.spec.embedding_multiplier != 1.0:
            x.mul_(self.spec.embedding_multiplier)
        if not self.spec.multiplies_prompts:
            splice(x, splices)
        if isinstance(self.spec.positions, Learned) and self._positions is not None:
            rows = inputs.positions + self.spec.positions.offset
            x += functional.embedding(rows, self._positions)
        return x if self._embedding_norm is None else self._embedding_norm(x, None)

    def _network(self, stream: Tensor, inputs: StepInputs, cache: Cache) -> Tensor:
        """The blocks and the head, [T, hidden] -> [N, this rank's vocabulary rows]."""
        addition: Tensor | None = None
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            addition = self._run_block(block, stream, addition, layer_cache, inputs)
        index, lora = inputs.logits_index, inputs.lora
        if len(index) < len(stream):
            lora = None if lora is None else lora.index_select(0, index)
            stream = stream.index_select(0, index)
            addition = None if addition is None else addition.index_select(0, index)
        if not len(index):
            return stream.new_empty(0, self._embedding.num_rows, dtype=torch.float32)
        return self.head(self.final_norm(stream, addition), lora)

    def _whole(self, logits: Tensor) -> Tensor:
        """The logits of all ranks."""
        logits = self.group.gather(logits, self.spec.vocab_size)
        if self.spec.logits_multiplier != 1.0:
            logits.mul_(self.spec.logits_multiplier)
        return logits


def _sequential(
    block: Block, stream: Tensor, addition: Tensor | None, cache: LayerCache, inputs: StepInputs
) -> Tensor:
    attended = block.complete(block.attend(block.attention_norm(stream, addition), cache, inputs))
    assert block.mlp_norm is not None
    return block.complete(block.mlp(block.mlp_norm(stream, attended), inputs))


def _parallel(
    block: Block, stream: Tensor, addition: Tensor | None, cache: LayerCache, inputs: StepInputs
) -> Tensor:
    attended = block.attend(block.attention_norm(stream, addition), cache, inputs)
    assert block.mlp_norm is not None
    return block.complete(attended.add_(block.mlp(block.mlp_norm(stream, None), inputs)))


def _shared(
    block: Block, stream: Tensor, addition: Tensor | None, cache: LayerCache, inputs: StepInputs
) -> Tensor:
    x = block.attention_norm(stream, addition)
    return block.complete(block.attend(x, cache, inputs).add_(block.mlp(x, inputs)))


RunBlock = Callable[[Block, Tensor, Tensor | None, LayerCache, StepInputs], Tensor]

TOPOLOGIES: dict[Topology, RunBlock] = {
    "sequential": _sequential,
    "parallel": _parallel,
    "shared": _shared,
}
"""(block, stream, what the block before adds to it, ...) -> what this block adds to it."""


def _load_block(
    spec: DecoderSpec,
    names: TensorNames,
    weights: Weights,
    group: Group,
    layer: int,
    ops: ModuleType,
    attend: Attend | None,
) -> Block:
    q_norm, k_norm = (weights.head_norm(layer, name) for name in (names.q_norm, names.k_norm))
    heads = heads_of(spec, group.shard, layer, q_norm, k_norm, weights.device)
    mlp_norm = None
    if names.mlp_norm is not None:
        mlp_norm = ResidualNorm(ops, spec.norm, weights.block_norm(layer, names.mlp_norm))
    return Block(
        attention_norm=ResidualNorm(
            ops, spec.norm, weights.block_norm(layer, names.attention_norm)
        ),
        qkv=weights.qkv(layer),
        attention=BlocksAttention(heads, ops, attend) if attend else RowsAttention(heads, ops),
        attention_out=weights.attention_out(layer),
        mlp_norm=mlp_norm,
        mlp_in=weights.mlp_in(layer),
        activation=_activation(ops, spec),
        mlp_out=weights.mlp_out(layer),
        multiplier=spec.residual_multiplier,
        complete=group.sum_,
    )


def _activation(ops: ModuleType, spec: DecoderSpec) -> Callable[[Tensor], Tensor]:
    """The MLP's activation, of the gate where there is one."""
    activate: Callable[..., Tensor] = ops.act_mul if spec.gated_mlp else ops.act
    return lambda x: activate(x, spec.activation)
