"""A paged attention kernel in Triton, for what others do not serve: ALiBi, odd sizes, float32.

One program computes some rows of one sequence and one key head: a row is a new token and one of the
query heads that read that key head. It goes through the sequence's blocks with a running softmax
(FlashAttention; Dao et al. 2022), and reads nothing beyond the last key.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,import-not-found,import-untyped,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgis.models.attention.heads import Heads
from tgis.models.inputs import StepInputs

_ROWS = 16  # of a program at least, which matrix units multiply together
_MANY_ROWS = 64  # ... where a sequence has many new tokens
_KEYS = 64  # at a time, at most a block


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    q_start_ptr,
    kv_len_ptr,
    slopes_ptr,
    scale,
    table_width,
    HEADS: tl.constexpr,  # noqa: N803
    KV_HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
):
    group: tl.constexpr = HEADS // KV_HEADS
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(q_start_ptr + sequence)
    num_new = tl.load(q_start_ptr + sequence + 1) - start
    if tile * ROWS >= num_new * group:
        return
    old = tl.load(kv_len_ptr + sequence) - num_new
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row // group, kv_head * group + row % group
    dim = tl.arange(0, WIDTH)
    inside = (token < num_new)[:, None] & (dim < DIM)[None, :]
    place = ((start + token).to(tl.int64) * HEADS + head)[:, None] * DIM + dim[None, :]
    q = tl.load(q_ptr + place, mask=inside, other=0.0)
    if ALIBI:
        slope = tl.load(slopes_ptr + head)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    end = old + tl.minimum((tile * ROWS + ROWS - 1) // group + 1, num_new)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(old + tile * ROWS // group - WINDOW + 1, 0) // KEYS * KEYS
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        block = tl.load(tables_ptr + sequence * table_width + first // SIZE).to(tl.int64)
        cached = block * SIZE + first % SIZE + tl.arange(0, KEYS)
        where = (cached * KV_HEADS + kv_head)[:, None] * DIM + dim[None, :]
        there = (key < end)[:, None] & (dim < DIM)[None, :]
        k = tl.load(k_ptr + where, mask=there, other=0.0)
        v = tl.load(v_ptr + where, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        distance = (old + token)[:, None] - key[None, :]
        if ALIBI:
            scores -= slope[:, None] * distance
        visible = (distance >= 0) & (key < end)[None, :]
        if WINDOW > 0:
            visible = visible & (distance < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing so far
        mass = tl.exp(scores - level[:, None])
        fade = tl.exp(top - level)
        total = total * fade + tl.sum(mass, 1)
        mixed = mixed * fade[:, None] + tl.dot(mass.to(v.dtype), v, input_precision="ieee")
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # of rows that fill a tile up
    tl.store(out_ptr + place, (mixed / total[:, None]).to(q.dtype), mask=inside)


def attend_paged(
    q: Tensor, keys: Tensor, values: Tensor, inputs: StepInputs, heads: Heads
) -> Tensor:
    """See `blocks.Attend`."""
    blocks = inputs.blocks
    assert blocks is not None
    q, out, size = q.contiguous(), torch.empty_like(q), keys.shape[1]
    group, longest = heads.num_heads // heads.num_kv_heads, max(blocks.num_new)
    rows = _MANY_ROWS if longest * group >= _MANY_ROWS else _ROWS
    grid = (triton.cdiv(longest * group, rows), heads.num_kv_heads, len(inputs.kv_len))
    _attend[grid](
        q,
        keys,
        values,
        out,
        blocks.tables,
        inputs.q_start,
        inputs.kv_len,
        heads.slopes if heads.slopes is not None else q,
        heads.scale,
        blocks.tables.shape[1],
        HEADS=heads.num_heads,
        KV_HEADS=heads.num_kv_heads,
        DIM=heads.head_dim,
        WIDTH=max(triton.next_power_of_2(heads.head_dim), 16),
        SIZE=size,
        ROWS=rows,
        KEYS=min(_KEYS, size),
        WINDOW=heads.window,
        ALIBI=heads.slopes is not None,
    )
    return out
