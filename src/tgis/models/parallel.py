"""Which part of a weight belongs to which rank (Megatron-LM's split, arXiv:1909.08053)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgis.errors import ModelError
from tgis.models.spec import DecoderSpec

Span = tuple[int, int]
"""A half-open range: first, one past the last."""


@dataclass(frozen=True, slots=True)
class Shard:
    """This process's place among those that share a model."""

    rank: int = 0
    world_size: int = 1

    def even(self, total: int, what: str) -> Span:
        """This rank's part of `total` things that must divide evenly.

        Raises:
            ModelError: they do not; the message has the numbers.
        """
        if total % self.world_size:
            raise ModelError(
                f"`{what}` must be divisible by `num_shards`"
                f" (got `{what}`: {total} and `num_shards`: {self.world_size})"
            )
        part = total // self.world_size
        return self.rank * part, (self.rank + 1) * part

    def blocks(self, total: int) -> Span:
        """This rank's part of `total` rows of a vocabulary: equal blocks, the last one shorter.

        Raises:
            ModelError: nothing would be left for the last rank.
        """
        part = -(-total // self.world_size)
        if part * (self.world_size - 1) >= total:
            raise ModelError(
                f"`vocab_size` is too small for `num_shards`"
                f" (got `vocab_size`: {total} and `num_shards`: {self.world_size})"
            )
        return self.rank * part, min((self.rank + 1) * part, total)

    def query_heads(self, spec: DecoderSpec) -> Span:
        """Query heads that this rank computes."""
        return self.even(spec.num_heads, "num_heads")

    def kv_heads(self, spec: DecoderSpec) -> Span:
        """Key/value heads that this rank's query heads read; copied where ranks outnumber them.

        Raises:
            ModelError: neither number divides the other.
        """
        if self.world_size > spec.num_kv_heads and self.world_size % spec.num_kv_heads == 0:
            head = self.rank * spec.num_kv_heads // self.world_size
            return head, head + 1
        return self.even(spec.num_kv_heads, "num_key_value_heads")


class VocabularyTable:
    """Embeddings of which each rank holds a block of rows; those of others are zeros here.

    Args:
        rows: [this rank's rows, hidden].
        total: rows of the whole table.
        dtype: of what is looked up, if not that of the rows.
    """

    def __init__(
        self, rows: Tensor, shard: Shard, total: int, dtype: torch.dtype | None = None
    ) -> None:
        self._rows = rows
        self._dtype = dtype or rows.dtype
        self._first, self._last = shard.blocks(total)
        self._total = total

    @property
    def num_rows(self) -> int:
        """This rank's rows."""
        return self._last - self._first

    def __call__(self, ids: Tensor) -> Tensor:
        """This rank's part of the sum over ranks, [T] -> [T, hidden].

        Raises:
            IndexError: an id beyond the table.
        """
        if self.num_rows == self._total:
            return functional.embedding(ids, self._rows).to(self._dtype)
        on_cpu = ids.device.type == "cpu"  # elsewhere looking would mean waiting
        if len(ids) and on_cpu and not 0 <= int(ids.min()) <= int(ids.max()) < self._total:
            raise IndexError("index out of range: a token id beyond the vocabulary")
        elsewhere = (ids < self._first) | (ids >= self._last)
        x = functional.embedding((ids - self._first).masked_fill_(elsewhere, 0), self._rows)
        return x.masked_fill_(elsewhere.unsqueeze(1), 0).to(self._dtype)
