"""Attention over the row layout: one operator stores, one attends, both of `models.kernels`."""

from types import ModuleType

import torch
from torch import Tensor

from tgis.models import kernels
from tgis.models.attention.heads import heads_of
from tgis.models.inputs import StepInputs
from tgis.models.kernels import reference
from tgis.models.kv_cache import LayerCache
from tgis.models.parallel import Shard
from tgis.models.spec import DecoderSpec


def operators(dtype: torch.dtype) -> ModuleType:
    """The fused kernels, or their PyTorch twins for types that they do not know."""
    return kernels if dtype in (torch.float32, torch.bfloat16) else reference


class RowsAttention:
    """One layer's attention on this rank.

    Args:
        layer: its number, which may decide its window.
        q_norm: [head_dim], and `k_norm` too: RMS norms of query and key heads, or None.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        shard: Shard,
        layer: int,
        dtype: torch.dtype,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> None:
        self._heads = heads_of(spec, shard, layer, q_norm, k_norm)
        self._norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": self._heads.eps}
        self._ops = operators(dtype)

    def __call__(self, qkv: Tensor, cache: LayerCache, inputs: StepInputs) -> Tensor:
        """[T, (heads + 2 * kv_heads) * head_dim] -> [T, heads * head_dim]."""
        heads = self._heads
        if heads.clip is not None:
            qkv = qkv.clamp_(-heads.clip, heads.clip)
        q = self._ops.rope_store(
            qkv,
            inputs.cos,
            inputs.sin,
            cache.k,
            cache.v,
            inputs.token_slot,
            inputs.positions,
            heads.num_heads,
            heads.num_kv_heads,
            **self._norms,
        )
        out: Tensor = self._ops.attention(
            q,
            cache.k,
            cache.v,
            inputs.slots,
            inputs.q_start,
            inputs.kv_len,
            heads.scale,
            alibi_slopes=heads.slopes,
            window=heads.window,
        )
        return out
