"""Where a rank's query, key and value heads lie in a checkpoint's projections."""

from collections.abc import Iterable

from tgis.models.families.base import FusedQkv, SeparateQkv
from tgis.models.parallel import Shard, Span
from tgis.models.spec import DecoderSpec

Rows = tuple[str, int, tuple[Span, ...]]
"""A checkpoint matrix, the number of its rows, and those of them that are wanted, in order."""


def qkv_rows(spec: DecoderSpec, qkv: FusedQkv | SeparateQkv, shard: Shard) -> list[Rows]:
    """This rank's query heads, then its key heads, then its value heads."""
    heads, kv_heads = range(*shard.query_heads(spec)), range(*shard.kv_heads(spec))
    if isinstance(qkv, SeparateQkv):
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return [
            (qkv.q, q_rows, _rows(heads, spec.head_dim)),
            (qkv.k, kv_rows, _rows(kv_heads, spec.head_dim)),
            (qkv.v, kv_rows, _rows(kv_heads, spec.head_dim)),
        ]
    total = spec.num_heads + 2 * spec.num_kv_heads
    if qkv.layout == "stacked":
        k_first, v_first = spec.num_heads, spec.num_heads + spec.num_kv_heads
        order = [*heads, *(k_first + h for h in kv_heads), *(v_first + h for h in kv_heads)]
    else:
        group = spec.num_heads // spec.num_kv_heads
        queries = [h // group * (group + 2) + h % group for h in heads]
        keys = [h * (group + 2) + group for h in kv_heads]
        order = [*queries, *keys, *(h + 1 for h in keys)]
    return [(qkv.name, total * spec.head_dim, _rows(order, spec.head_dim))]


def _rows(heads: Iterable[int], head_dim: int) -> tuple[Span, ...]:
    """The rows of these heads, neighbours joined."""
    spans: list[Span] = []
    for head in heads:
        start, stop = head * head_dim, (head + 1) * head_dim
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    return tuple(spans)
