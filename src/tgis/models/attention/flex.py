"""PyTorch's FlexAttention over block tables.

The pool is one long sequence of keys for every sequence of the step, of which the block mask leaves
the sequence's own blocks. A block is at one place in all sequences that share it, but it belongs to
some of them only: so the mask knows, per sequence, which block is which of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tgis.models.attention.blocks import Attend
from tgis.models.attention.heads import Heads
from tgis.models.inputs import BlockTables, StepInputs

BLOCK_TOKENS = 128
_QUERIES = 128  # of a tile of the block mask

Flex = Callable[..., Tensor]


class _Prepared(NamedTuple):
    """The step as a padded batch [S, longest]; all tensors are made without waiting for any."""

    gather: Tensor  # int64 [S, longest]: which token; any for padding
    scatter: tuple[Tensor, Tensor]  # int64 [T] each: sequence and place in it
    logical: Tensor  # int32 [S, blocks]: which block of the sequence a block is; -1: of others
    first: Tensor  # int32 [S]: position of the sequence's first new token
    num_new: Tensor  # int32 [S]
    masks: dict[int, BlockMask]  # by window


def make_flex(flex: Flex = flex_attention) -> Attend:
    """A back end on `flex_attention`, compiled or not."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, heads: Heads) -> Tensor:
        blocks = inputs.blocks
        assert blocks is not None
        num_blocks, size = keys.shape[:2]
        if "flex" not in blocks.prepared:
            blocks.prepared["flex"] = _prepare(inputs, blocks, num_blocks, size)
        step: _Prepared = blocks.prepared["flex"]
        if heads.window not in step.masks:
            step.masks[heads.window] = _mask(step, blocks, num_blocks, size, heads.window)
        out = flex(
            q[step.gather].transpose(1, 2),
            keys.view(1, -1, *keys.shape[2:]).transpose(1, 2),
            values.view(1, -1, *values.shape[2:]).transpose(1, 2),
            score_mod=_alibi(step, size, heads.slopes),
            block_mask=step.masks[heads.window],
            scale=heads.scale,
            enable_gqa=heads.num_heads != heads.num_kv_heads,
        )
        return out.transpose(1, 2)[step.scatter]

    return attend


def load_flex() -> Attend:
    """The back end as cards want it: one fused kernel, compiled when first called."""
    return make_flex(torch.compile(flex_attention, dynamic=True))


def _prepare(inputs: StepInputs, blocks: BlockTables, num_blocks: int, size: int) -> _Prepared:
    device = inputs.positions.device
    q_start = inputs.q_start.long()
    tokens = torch.arange(len(inputs.positions), device=device)
    sequence = torch.bucketize(tokens, q_start[1:], right=True)
    places = torch.arange(max(blocks.num_new), device=device)
    gather = q_start[:-1, None] + places
    # What fills a table up counts as a block beyond the pool.
    numbers = torch.arange(blocks.tables.shape[1], device=device, dtype=torch.int32)
    own = numbers * size < inputs.kv_len[:, None]
    column = blocks.tables.where(own, num_blocks).long()
    logical = numbers.new_full((len(column), num_blocks + 1), -1)
    return _Prepared(
        gather=gather.clamp(max=len(tokens) - 1),
        scatter=(sequence, tokens - q_start[sequence]),
        logical=logical.scatter_(1, column, numbers.expand_as(column)),
        first=inputs.kv_len - inputs.q_start.diff(),
        num_new=inputs.q_start.diff(),
        masks={},
    )


def _mask(
    step: _Prepared, blocks: BlockTables, num_blocks: int, size: int, window: int
) -> BlockMask:
    """Which blocks each tile of queries reads: those that all its queries see whole, and others."""
    longest, width = step.gather.shape[1], blocks.tables.shape[1]
    tile = torch.arange(-(-longest // _QUERIES), device=step.first.device, dtype=torch.int32)
    begin = tile * _QUERIES  # [tiles], places in the sequence's new tokens
    end = torch.minimum(begin + _QUERIES, step.num_new[:, None])  # [S, tiles]
    first = step.first[:, None] + begin  # position of the tile's first query
    low = (first - window + 1).clamp(min=0) // size if window else torch.zeros_like(first)
    whole = torch.zeros_like(first) if window else (first + 1) // size
    count = (step.first[:, None] + end - 1) // size + 1 - low - whole
    empty = end <= begin
    numbers = torch.arange(width, device=first.device)

    def read(start: Tensor) -> Tensor:
        """The blocks of each tile from one on, [S, 1, tiles, width]."""
        index = (start[..., None] + numbers).clamp(max=width - 1)
        tables = blocks.tables[:, None].expand(-1, len(tile), -1)
        return tables.gather(2, index)[:, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block = step.logical[b, kv // size]
        distance = step.first[b] + q - (block * size + kv % size)
        visible = (block >= 0) & (distance >= 0)
        return visible & (distance < window) if window else visible

    return BlockMask.from_kv_blocks(
        count.masked_fill(empty, 0)[:, None],
        read(low + whole),
        whole.masked_fill(empty, 0)[:, None],
        read(low),
        BLOCK_SIZE=(_QUERIES, size),
        mask_mod=mask_mod,
        seq_lengths=(longest, num_blocks * size),
        compute_q_blocks=False,
    )


def _alibi(step: _Prepared, size: int, slopes: Tensor | None) -> Callable[..., Tensor] | None:
    if slopes is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        position = step.logical[b, kv // size] * size + kv % size
        return score + slopes[h] * (position - step.first[b] - q)

    return score_mod
