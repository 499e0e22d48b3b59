"""A rank's parameters, loaded from a checkpoint by a family's names.

How each splits over ranks: queries, keys, values and the MLP's inputs by output feature; the
outputs of attention and MLP by input feature (their sums are completed over the ranks, rank 0 adds
the bias); embeddings and head by vocabulary row; norms and position tables are whole everywhere.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tgis.errors import ModelError
from tgis.hub.safetensors import Checkpoint
from tgis.models.families.base import TensorNames
from tgis.models.inputs import CPU
from tgis.models.lora import SAMPLE_ROWS, Adaptable, LoraSites
from tgis.models.packing import PLAIN, Packing
from tgis.models.parallel import Shard, Span
from tgis.models.qkv import qkv_rows
from tgis.models.spec import DecoderSpec, Learned
from tgis.quant.linear import LinearSource, Piece, load_linear


class NormWeights(NamedTuple):
    """Weight [n] and bias [n]."""

    weight: Tensor
    bias: Tensor | None


class Weights:
    """Loads one parameter after the other; memory holds one of them twice at most.

    Args:
        dtype: of everything that is loaded.
        packing: how layers are made.
        device: of everything that is not in the packing's layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        names: TensorNames,
        shard: Shard,
        dtype: torch.dtype,
        packing: Packing = PLAIN,
        device: torch.device = CPU,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._names = names
        self._shard = shard
        self._dtype = dtype
        self._packing = packing
        self.device = device
        self._prefix = self._first_stored(names.prefixes, after=names.embedding)
        self._head = self._first_stored(names.heads)
        self.lora = LoraSites(dtype, shard, names.prefixes, device)

    def embedding(self) -> Tensor:
        """Token embeddings [vocab rows of this rank, hidden].

        A table that the head packs too stays in the file, in its own type: memory shall not hold
        the largest weight twice.
        """
        stored, shape = self._embedding_name(), self._vocab_shape()
        name = self._prefix + self._names.embedding
        self.lora.embedding(name, shape, self._table(stored, (0, SAMPLE_ROWS)))
        rows = self._shard.blocks(self._spec.vocab_size)
        if self._head_name() == stored and self.device.type == "cpu":
            return self._checkpoint.lasting(f"{stored}.weight", shape)[slice(*rows)]
        return self._table(stored, rows)

    def positions(self) -> Tensor | None:
        """Position embeddings [positions, hidden], where the family has them."""
        learned = self._spec.positions
        if not isinstance(learned, Learned) or self._spec.max_positions is None:
            return None
        rows = self._spec.max_positions + learned.offset
        assert self._names.positions is not None
        name = self._prefix + self._names.positions
        return self._vector(f"{name}.weight", (rows, self._spec.hidden_size))

    def head(self) -> Adaptable:
        """hidden -> float32 logits of this rank's vocabulary rows; the embeddings' where tied."""
        name, rows = self._head_name(), self._shard.blocks(self._spec.vocab_size)
        piece = Piece(name, self._vocab_shape(), (rows,), (0, self._spec.hidden_size))
        stored = LinearSource((piece,), has_bias=False)
        source = LinearSource((replace(piece, name=self._head),), has_bias=False)
        is_float = f"{name}.weight" in self._checkpoint
        sample = self._table(name, (0, SAMPLE_ROWS)) if is_float else None
        make, formats = self._packing.make_head, self._packing.head_formats
        layer = load_linear(self._checkpoint, stored, self._dtype, make, formats)
        return self.lora.head(layer, source, self._names.heads, sample)

    def norm(self, name: str, size: int, bias: bool | None = None) -> NormWeights:
        """A norm's weight and, if the family's norms have one, bias."""
        has_bias = self._spec.norm.bias if bias is None else bias
        weight = self._vector(f"{name}.weight", (size,))
        if self._spec.norm.weight_offset:
            weight += self._spec.norm.weight_offset
        return NormWeights(weight, self._vector(f"{name}.bias", (size,)) if has_bias else None)

    def outer_norm(self, name: str) -> NormWeights:
        """A norm outside the blocks."""
        return self.norm(self._prefix + name, self._spec.hidden_size)

    def block_norm(self, layer: int, name: str) -> NormWeights:
        """A norm of a block's input."""
        return self.norm(self._block(layer, name), self._spec.hidden_size)

    def head_norm(self, layer: int, name: str | None) -> Tensor | None:
        """A norm of query or key heads."""
        if not self._spec.qk_norm or name is None:
            return None
        return self.norm(self._block(layer, name), self._spec.head_dim, bias=False).weight

    def qkv(self, layer: int) -> Adaptable:
        """hidden -> this rank's query heads, its key heads, its value heads."""
        spec, block = self._spec, self._block(layer)
        pieces = tuple(
            self._piece(block + name, (num_rows, spec.hidden_size), rows, (0, spec.hidden_size))
            for name, num_rows, rows in qkv_rows(spec, self._names.qkv, self._shard)
        )
        return self._linear(pieces, spec.qkv_bias)

    def attention_out(self, layer: int) -> Adaptable:
        """This rank's heads -> its part of the sum over ranks."""
        first, last = self._shard.query_heads(self._spec)
        head_dim = self._spec.head_dim
        columns = (first * head_dim, last * head_dim)
        name = self._block(layer, self._names.attention_out)
        in_features = self._spec.num_heads * head_dim
        return self._sum(name, in_features, columns, self._spec.attention_out_bias)

    def mlp_in(self, layer: int) -> Adaptable:
        """hidden -> this rank's part of the gate (where there is one) and of the inner values."""
        spec = self._spec
        rows = self._shard.even(spec.intermediate_size, "intermediate_size")
        shape = (spec.intermediate_size, spec.hidden_size)
        pieces = tuple(
            self._piece(self._block(layer, name), shape, (rows,), (0, spec.hidden_size))
            for name in self._names.mlp_in
        )
        return self._linear(pieces, spec.mlp_bias)

    def mlp_out(self, layer: int) -> Adaptable:
        """This rank's inner values -> its part of the sum over ranks."""
        total = self._spec.intermediate_size
        columns = self._shard.even(total, "intermediate_size")
        name = self._block(layer, self._names.mlp_out)
        return self._sum(name, total, columns, self._spec.mlp_bias)

    def finish(self) -> None:
        """Check that nothing is left over.

        Raises:
            ModelError: the checkpoint has tensors that the network does not.
        """
        ignored = re.compile("|".join(self._names.ignored) or "(?!)")
        extra = [name for name in self._checkpoint.untaken() if not ignored.fullmatch(name)]
        if extra:
            shown = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
            raise ModelError(
                f"{len(extra)} tensors of the checkpoint have no place in a {self._spec.family}"
                f" network of this config.json: {shown}"
            )

    def _first_stored(self, names: tuple[str, ...], after: str = "") -> str:
        """The first of `names` that belongs to a stored weight, else the first."""
        stored = (name for name in names if f"{name}{after}.weight" in self._checkpoint)
        return next(stored, names[0])

    def _embedding_name(self) -> str:
        """The embeddings', or the head's where both are one and only that is stored."""
        name, head = self._prefix + self._names.embedding, self._head
        is_stored, head_is = (f"{n}.weight" in self._checkpoint for n in (name, head))
        return head if self._spec.tied_head and head_is and not is_stored else name

    def _head_name(self) -> str:
        """The head's, or the embeddings' where both are one and only that is stored."""
        is_stored = f"{self._head}.weight" in self._checkpoint
        return self._embedding_name() if self._spec.tied_head and not is_stored else self._head

    def _block(self, layer: int, name: str = "") -> str:
        return f"{self._prefix}{self._names.block.format(layer)}.{name}"

    def _vocab_shape(self) -> tuple[int, int]:
        return self._spec.vocab_size, self._spec.hidden_size

    def _table(self, name: str, rows: Span) -> Tensor:
        with self._checkpoint.tensor(f"{name}.weight", self._vocab_shape()) as stored:
            return stored[slice(*rows)].to(self.device, self._dtype, copy=True)

    def _vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        with self._checkpoint.tensor(name, shape) as stored:
            return stored.to(self.device, self._dtype, copy=True)

    def _sum(self, name: str, in_features: int, columns: Span, bias: bool) -> Adaptable:
        """A layer whose outputs are sums over the ranks."""
        hidden = self._spec.hidden_size
        piece = self._piece(name, (hidden, in_features), ((0, hidden),), columns)
        return self._linear((piece,), bias, adds_bias=self._shard.rank == 0)

    def _piece(
        self, name: str, shape: tuple[int, int], rows: tuple[Span, ...], columns: Span
    ) -> Piece:
        return Piece(name, shape, rows, columns, transposed=self._names.transposed)

    def _linear(self, pieces: tuple[Piece, ...], bias: bool, adds_bias: bool = True) -> Adaptable:
        source = LinearSource(pieces, has_bias=bias, adds_bias=adds_bias)
        make, formats = self._packing.make_linear, self._packing.formats
        layer = load_linear(self._checkpoint, source, self._dtype, make, formats)
        return self.lora.layer(layer, source)
