"""Attention over the row layout: one operator stores, one attends, both of `models.kernels`."""

from types import ModuleType

import torch
from torch import Tensor

from tgis.models import kernels
from tgis.models.attention.heads import Heads
from tgis.models.inputs import CPU, StepInputs
from tgis.models.kernels import reference
from tgis.models.kv_cache import LayerCache


def operators(dtype: torch.dtype, device: torch.device = CPU) -> ModuleType:
    """The fused kernels, or their PyTorch twins for types and devices that they do not know."""
    known = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return kernels if known else reference


class RowsAttention:
    """One layer's attention on this rank.

    Args:
        ops: has the operators.
    """

    def __init__(self, heads: Heads, ops: ModuleType) -> None:
        self._heads = heads
        self._norms = {"q_norm": heads.q_norm, "k_norm": heads.k_norm, "eps": heads.eps}
        self._ops = ops

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
