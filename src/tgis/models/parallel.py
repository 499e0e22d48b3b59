"""Which part of a weight belongs to which rank (Megatron-LM's split, arXiv:1909.08053)."""

from dataclasses import dataclass

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
        """This rank's part of `total` rows of a vocabulary: equal blocks, the last ones shorter."""
        part = -(-total // self.world_size)
        return min(self.rank * part, total), min((self.rank + 1) * part, total)

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
