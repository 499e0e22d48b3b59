"""Parameters of an encoder-decoder network, by the names of T5's checkpoints."""

from dataclasses import replace

import torch
from torch import Tensor

from tgis.errors import ModelError
from tgis.hub.safetensors import Checkpoint
from tgis.models.lora import SAMPLE_ROWS, Adaptable, LoraSites
from tgis.models.packing import PLAIN, Packing
from tgis.models.parallel import Shard
from tgis.models.seq2seq_spec import Seq2SeqSpec
from tgis.quant.linear import LinearSource, Piece, load_linear

_EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
# Old checkpoints keep a bias that cross attention never uses.
_IGNORED = (
    *(f"{name}.weight" for name in _EMBEDDINGS),
    "lm_head.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


class Seq2SeqWeights:
    """Loads one parameter after the other.

    `block` below is a block's place in the checkpoint, such as `decoder.block.3`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: Seq2SeqSpec,
        shard: Shard,
        dtype: torch.dtype,
        packing: Packing = PLAIN,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._shard = shard
        self._dtype = dtype
        self._packing = packing
        first, last = shard.even(spec.num_heads, "n_heads")
        self._head_rows = (first * spec.head_dim, last * spec.head_dim)
        self._heads = slice(first, last)
        self._vocabulary = shard.blocks(spec.vocab_size)
        self.lora = LoraSites(dtype, shard)

    def embedding(self) -> Tensor:
        """Token embeddings [vocab rows of this rank, hidden], shared by encoder and decoder.

        A table that the head packs too stays in the file, in its own type.
        """
        name, rows = f"{self._embedding_name()}.weight", slice(*self._vocabulary)
        if self._head_name() == self._embedding_name():
            return self._checkpoint.lasting(name, self._vocab_shape())[rows]
        with self._checkpoint.tensor(name, self._vocab_shape()) as stored:
            return stored[rows].to(self._dtype, copy=True)

    def head(self) -> Adaptable:
        """hidden -> float32 logits of this rank's rows; the embeddings' if no other is stored."""
        name, shape = self._head_name(), self._vocab_shape()
        piece = Piece(name, shape, (self._vocabulary,), self._hidden())
        source = LinearSource((piece,), has_bias=False)
        make, formats = self._packing.make_head, self._packing.head_formats
        layer = load_linear(self._checkpoint, source, self._dtype, make, formats)
        with self._checkpoint.tensor(f"{name}.weight", shape) as stored:
            sample = stored[:SAMPLE_ROWS].to(self._dtype, copy=True)
        known = LinearSource((replace(piece, name="lm_head"),), has_bias=False)
        return self.lora.head(layer, known, ("lm_head",), sample)

    def norm(self, name: str) -> Tensor:
        """Weight [hidden] of a norm."""
        return self._tensor(f"{name}.weight", (self._spec.hidden_size,))

    def relative_bias(self, stack: str) -> Tensor:
        """float32 [buckets, this rank's heads] of `encoder` or `decoder`."""
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shape = (self._spec.num_buckets, self._spec.num_heads)
        with self._checkpoint.tensor(name, shape) as stored:
            return stored[:, self._heads].to(torch.float32, copy=True)

    def projection(self, attention: str, parts: str) -> Adaptable:
        """hidden -> this rank's heads of `parts`, such as "qkv" or "kv", one after the other."""
        inner = self._spec.num_heads * self._spec.head_dim
        shape = (inner, self._spec.hidden_size)
        return self._linear(
            tuple(
                Piece(f"{attention}.{part}", shape, (self._head_rows,), self._hidden())
                for part in parts
            )
        )

    def attention_out(self, attention: str) -> Adaptable:
        """This rank's heads -> its part of the sum over ranks."""
        spec = self._spec
        shape = (spec.hidden_size, spec.num_heads * spec.head_dim)
        return self._linear((Piece(f"{attention}.o", shape, (self._hidden(),), self._head_rows),))

    def mlp_in(self, mlp: str) -> Adaptable:
        """hidden -> this rank's gate (where there is one) and inner values."""
        rows = self._shard.even(self._spec.intermediate_size, "d_ff")
        shape = (self._spec.intermediate_size, self._spec.hidden_size)
        names = ("wi_0", "wi_1") if self._spec.gated_mlp else ("wi",)
        return self._linear(
            tuple(Piece(f"{mlp}.{name}", shape, (rows,), self._hidden()) for name in names)
        )

    def mlp_out(self, mlp: str) -> Adaptable:
        """This rank's inner values -> its part of the sum, float32 throughout.

        T5's inner values grow so large that fewer bits lose what matters.
        """
        columns = self._shard.even(self._spec.intermediate_size, "d_ff")
        shape = (self._spec.hidden_size, self._spec.intermediate_size)
        piece = Piece(f"{mlp}.wo", shape, (self._hidden(),), columns)
        formats = self._packing.formats
        source = LinearSource((piece,), has_bias=False)
        make = PLAIN.make_linear
        layer = load_linear(self._checkpoint, source, torch.float32, make, formats)
        return self.lora.layer(layer, source, torch.float32)

    def finish(self) -> None:
        """Check that nothing is left over.

        Raises:
            ModelError: the checkpoint has tensors that the network does not.
        """
        extra = [name for name in self._checkpoint.untaken() if name not in _IGNORED]
        if extra:
            raise ModelError(
                f"{len(extra)} tensors of the checkpoint have no place in a {self._spec.family}"
                f" network of this config.json: {', '.join(extra[:5])}"
            )

    def _embedding_name(self) -> str:
        names = (*_EMBEDDINGS, "lm_head")
        stored = (name for name in names if f"{name}.weight" in self._checkpoint)
        return next(stored, names[0])

    def _head_name(self) -> str:
        return "lm_head" if "lm_head.weight" in self._checkpoint else self._embedding_name()

    def _vocab_shape(self) -> tuple[int, int]:
        return (self._spec.vocab_size, self._spec.hidden_size)

    def _hidden(self) -> tuple[int, int]:
        return (0, self._spec.hidden_size)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        with self._checkpoint.tensor(name, shape) as stored:
            return stored.to(self._dtype, copy=True)

    def _linear(self, pieces: tuple[Piece, ...]) -> Adaptable:
        source = LinearSource(pieces, has_bias=False)
        make, formats = self._packing.make_linear, self._packing.formats
        layer = load_linear(self._checkpoint, source, self._dtype, make, formats)
        return self.lora.layer(layer, source)
