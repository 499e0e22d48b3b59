"""What attention back ends need to know of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.models.attention.alibi import alibi_slopes
from tgis.models.parallel import Shard
from tgis.models.spec import Alibi, DecoderSpec


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """One layer's heads on this rank."""

    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int
    scale: float  # multiplies q.k
    window: int  # keys that a query sees, its own included; 0 = all
    slopes: Tensor | None  # float32 [num_heads], of ALiBi
    clip: float | None  # queries, keys and values are clamped to -clip .. clip
    q_norm: Tensor | None  # [head_dim]: RMS norms of query and key heads
    k_norm: Tensor | None
    eps: float  # of those


def heads_of(
    spec: DecoderSpec,
    shard: Shard,
    layer: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    device: torch.device | None = None,
) -> Heads:
    """The heads of a layer, whose number may decide its window."""
    first, last = shard.query_heads(spec)
    kv_first, kv_last = shard.kv_heads(spec)
    slopes = None
    if isinstance(spec.positions, Alibi):
        slopes = alibi_slopes(spec.num_heads, spec.positions.max_bias)
        if spec.positions.scaled:
            slopes *= spec.scale
        slopes = slopes[first:last].contiguous().to(device)
    return Heads(
        num_heads=last - first,
        num_kv_heads=kv_last - kv_first,
        head_dim=spec.head_dim,
        scale=spec.scale,
        window=spec.window(layer) or 0,
        slopes=slopes,
        clip=spec.qkv_clip,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=spec.norm.eps,
    )
