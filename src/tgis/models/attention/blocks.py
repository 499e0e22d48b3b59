"""Attention over the `blocks` layout: one operator stores, and a back end of the table attends."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from tgis.models.attention.heads import Heads
from tgis.models.inputs import StepInputs
from tgis.models.kernels import reference
from tgis.models.kv_cache import LayerCache

Attend = Callable[[Tensor, Tensor, Tensor, StepInputs, Heads], Tensor]
"""(q [T, heads, head_dim], keys and values [blocks, block_tokens, kv_heads, head_dim] that hold the
new tokens' already, the step, the layer) -> [T, heads, head_dim]. Each new token sees its
sequence's tokens up to its own, within the layer's window."""


class BlocksAttention:
    """One layer's attention on this rank.

    Args:
        ops: has `rope_store`, see `models.kernels.reference`.
    """

    def __init__(self, heads: Heads, ops: ModuleType, attend: Attend) -> None:
        self._heads = heads
        self._norms = {"q_norm": heads.q_norm, "k_norm": heads.k_norm, "eps": heads.eps}
        self._ops = ops
        self._attend = attend

    def __call__(self, qkv: Tensor, cache: LayerCache, inputs: StepInputs) -> Tensor:
        """[T, (heads + 2 * kv_heads) * head_dim] -> [T, heads * head_dim]."""
        heads, blocks = self._heads, inputs.blocks
        assert blocks is not None, "the step has no block tables"
        if heads.clip is not None:
            qkv = qkv.clamp_(-heads.clip, heads.clip)
        # To whom it stores, the pool is a row of one token for each of its places.
        pool = (-1, heads.num_kv_heads, 1, heads.head_dim)
        q = self._ops.rope_store(
            qkv,
            inputs.cos,
            inputs.sin,
            cache.k.view(pool),
            cache.v.view(pool),
            blocks.places,
            blocks.zeros,
            heads.num_heads,
            heads.num_kv_heads,
            **self._norms,
        )
        return self._attend(q, cache.k, cache.v, inputs, heads).flatten(1)


def attend_reference(
    q: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, heads: Heads
) -> Tensor:
    """The definition, in plain PyTorch, on every device: sequence by sequence, in float32.

    Lengths come from the host, so that it waits for nothing.
    """
    blocks = inputs.blocks
    assert blocks is not None
    out = []
    rows = torch.split(q, list(blocks.num_new))
    for row, table, num_keys in zip(rows, blocks.tables, blocks.num_keys, strict=True):
        num_blocks = -(-num_keys // keys.shape[1])
        k, v = (
            pool.index_select(0, table[:num_blocks]).flatten(0, 1)[:num_keys].transpose(0, 1)
            for pool in (keys, values)
        )
        out.append(
            reference.attend(row, k, v, heads.scale, alibi_slopes=heads.slopes, window=heads.window)
        )
    return torch.cat(out)
