"""Attention over the row layout: one operator stores, one attends, both of `models.kernels`."""

from types import ModuleType

import torch
from torch import Tensor

from tgis.models import kernels
from tgis.models.attention.alibi import alibi_slopes
from tgis.models.inputs import StepInputs
from tgis.models.kernels import reference
from tgis.models.kv_cache import LayerCache
from tgis.models.parallel import Shard
from tgis.models.spec import Alibi, DecoderSpec


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
        first, last = shard.query_heads(spec)
        kv_first, kv_last = shard.kv_heads(spec)
        self._num_heads = last - first
        self._num_kv_heads = kv_last - kv_first
        self._scale = spec.scale
        self._clip = spec.qkv_clip
        self._window = spec.window(layer) or 0
        self._norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": spec.norm.eps}
        self._slopes = None
        if isinstance(spec.positions, Alibi):
            slopes = alibi_slopes(spec.num_heads, spec.positions.max_bias)
            if spec.positions.scaled:
                slopes *= spec.scale
            self._slopes = slopes[first:last].contiguous()
        self._ops = operators(dtype)

    def __call__(self, qkv: Tensor, cache: LayerCache, inputs: StepInputs) -> Tensor:
        """[T, (heads + 2 * kv_heads) * head_dim] -> [T, heads * head_dim]."""
        if self._clip is not None:
            qkv = qkv.clamp_(-self._clip, self._clip)
        q = self._ops.rope_store(
            qkv,
            inputs.cos,
            inputs.sin,
            cache.k,
            cache.v,
            inputs.token_slot,
            inputs.positions,
            self._num_heads,
            self._num_kv_heads,
            **self._norms,
        )
        out: Tensor = self._ops.attention(
            q,
            cache.k,
            cache.v,
            inputs.slots,
            inputs.q_start,
            inputs.kv_len,
            self._scale,
            alibi_slopes=self._slopes,
            window=self._window,
        )
        return out
