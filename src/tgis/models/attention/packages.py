"""Thin calls of the paged kernels that other packages bring: flash-attn 2, 3 and flashinfer.

They are written after the packages' documentation, and read the cache where it lies.
"""

from typing import Any

import torch
from torch import Tensor

from tgis.models.attention.blocks import Attend
from tgis.models.attention.heads import Heads
from tgis.models.inputs import BlockTables, StepInputs

_WORKSPACE_BYTES = 128 << 20  # of flashinfer, as it recommends


def _window(heads: Heads) -> tuple[int, int]:
    """(keys to the left of a query's own, to the right); -1 = all."""
    return (heads.window - 1 if heads.window else -1, 0)


def load_flash_attn() -> Attend:
    """flash-attn 2: `flash_attn_varlen_func` with a block table."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    def attend(q: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, heads: Heads) -> Tensor:
        blocks = _blocks(inputs)
        if "flash_attn" not in blocks.prepared:
            blocks.prepared["flash_attn"] = _sums(inputs.kv_len)
        out: Tensor = flash_attn_varlen_func(
            q,
            keys,
            values,
            cu_seqlens_q=inputs.q_start,
            cu_seqlens_k=blocks.prepared["flash_attn"],
            max_seqlen_q=max(blocks.num_new),
            max_seqlen_k=max(blocks.num_keys),
            softmax_scale=heads.scale,
            causal=True,
            window_size=_window(heads),
            alibi_slopes=heads.slopes,
            block_table=blocks.tables,
        )
        return out

    return attend


def load_varlen() -> Attend:
    """PyTorch's `varlen_attn`, whose block tables need flash-attn 3 behind it."""
    from torch.nn.attention import activate_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    activate_flash_attention_impl("FA3")

    def attend(q: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, heads: Heads) -> Tensor:
        blocks = _blocks(inputs)
        out = varlen_attn(
            q,
            keys,
            values,
            inputs.q_start,
            None,
            max(blocks.num_new),
            max(blocks.num_keys),
            scale=heads.scale,
            window_size=_window(heads),
            enable_gqa=heads.num_heads != heads.num_kv_heads,
            seqused_k=inputs.kv_len,
            block_table=blocks.tables,
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def load_flashinfer() -> Attend:
    """flashinfer: planned once per step and window, from lengths on the host."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    wrappers: dict[int, Any] = {}  # by window

    def attend(q: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, heads: Heads) -> Tensor:
        blocks, window = _blocks(inputs), heads.window
        if window not in wrappers:
            workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            wrappers[window] = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        if ("flashinfer", window) not in blocks.prepared:
            wrappers[window].plan(
                *_pages(blocks, keys.shape[1]),
                heads.num_heads,
                heads.num_kv_heads,
                heads.head_dim,
                keys.shape[1],
                causal=True,
                sm_scale=heads.scale,
                window_left=_window(heads)[0],
                q_data_type=q.dtype,
            )
            blocks.prepared["flashinfer", window] = True
        out: Tensor = wrappers[window].run(q, (keys, values))
        return out

    return attend


def _pages(blocks: BlockTables, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qo_indptr, kv_indptr, kv_indices and kv_last_page_len; all but the indices on the host."""
    counts = torch.tensor([-(-length // size) for length in blocks.num_keys], dtype=torch.int32)
    new = torch.tensor(list(blocks.num_new), dtype=torch.int32)
    rows = zip(blocks.tables, counts.tolist(), strict=True)
    indices = torch.cat([table[:count] for table, count in rows])
    last = torch.tensor([(length - 1) % size + 1 for length in blocks.num_keys], dtype=torch.int32)
    return _sums(new), _sums(counts), indices, last


def _sums(counts: Tensor) -> Tensor:
    """[n] -> int32 [n + 1]: 0, and the sums of the first 1, 2, ..."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _blocks(inputs: StepInputs) -> BlockTables:
    assert inputs.blocks is not None
    return inputs.blocks
