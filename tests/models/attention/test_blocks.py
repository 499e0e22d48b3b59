"""Attention over block tables: the reference against SDPA, every back end against the reference."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tgis.models.attention.alibi import alibi_slopes
from tgis.models.attention.blocks import Attend, attend_reference
from tgis.models.attention.flex import make_flex
from tgis.models.attention.heads import Heads
from tgis.models.inputs import NewTokens, StepInputs

pytestmark = pytest.mark.usefixtures("single_thread")

CPU = torch.device("cpu")
HEADS = Heads(6, 2, 16, 0.3, 0, None, None, None, None, 1e-6)
KINDS = {
    "grouped": HEADS,
    "multi-query": replace(HEADS, num_kv_heads=1),
    "multi-head": replace(HEADS, num_kv_heads=6),
    "odd": replace(HEADS, num_heads=5, num_kv_heads=5, head_dim=12),
    "window": replace(HEADS, window=7),
    "alibi": replace(HEADS, slopes=alibi_slopes(6)),
    "alibi-window": replace(HEADS, slopes=alibi_slopes(6), window=40),
}
# (tokens already there, new ones) of each sequence
STEPS = {
    "decoding": [(0, 1), (5, 1), (47, 1), (16, 1), (15, 1)],
    "prefill": [(0, 37), (0, 1), (0, 16)],
    "chunks-and-decoding": [(31, 1), (20, 13), (0, 50), (48, 1), (3, 2)],
    "long": [(130, 140), (269, 1)],
}


@dataclass
class Case:
    """A step whose sequences lie scattered in a pool full of other numbers."""

    inputs: StepInputs
    heads: Heads
    q: Tensor
    k: Tensor
    v: Tensor
    keys: list[Tensor]  # of each sequence, [its tokens, kv_heads, head_dim]
    values: list[Tensor]

    def attend(self, attend: Attend) -> Tensor:
        return attend(self.q, self.k, self.v, self.inputs, self.heads)


def case(
    heads: Heads,
    step: list[tuple[int, int]],
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Case:
    generator = torch.Generator().manual_seed(3)
    counts = [-(-(old + new) // size) for old, new in step]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    shape = (len(order), size, heads.num_kv_heads, heads.head_dim)
    k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    tokens = NewTokens(size, device)
    keys, values = [], []
    for slot, ((old, new), count) in enumerate(zip(step, counts, strict=True)):
        table = [order.pop() for _ in range(count)]
        tokens.add(slot, [0] * new, old, 1, block_table=table)
        keys.append(k[table].flatten(0, 1)[: old + new])
        values.append(v[table].flatten(0, 1)[: old + new])
    num_new = sum(new for _, new in step)
    q = torch.randn((num_new, heads.num_heads, heads.head_dim), generator=generator)
    if heads.slopes is not None:
        heads = replace(heads, slopes=heads.slopes.to(device))
    return Case(tokens.inputs(None), heads, q.to(device, dtype), k, v, keys, values)


def oracle(one: Case, step: list[tuple[int, int]]) -> Tensor:
    """By PyTorch's SDPA with an explicit bias, in float64."""
    out, at = [], 0
    for (old, new), keys, values in zip(step, one.keys, one.values, strict=True):
        q = one.q[at : at + new].transpose(0, 1).double()
        at += new
        group = one.heads.num_heads // one.heads.num_kv_heads
        k, v = (t.transpose(0, 1).repeat_interleave(group, 0).double() for t in (keys, values))
        bias = torch.zeros(one.heads.num_heads, new, old + new, dtype=torch.float64)
        for i in range(new):
            for j in range(old + new):
                distance = old + i - j
                hidden = distance < 0 or (one.heads.window and distance >= one.heads.window)
                if hidden:
                    bias[:, i, j] = float("-inf")
                elif one.heads.slopes is not None:
                    bias[:, i, j] = -one.heads.slopes.cpu() * distance
        mask = bias.to(q.device)
        out.append(scaled_dot_product_attention(q, k, v, mask, scale=one.heads.scale))
    return torch.cat([o.transpose(0, 1) for o in out])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_the_reference_is_attention(kind: str, step: str) -> None:
    one = case(KINDS[kind], STEPS[step])
    expected = oracle(one, STEPS[step]).float()
    torch.testing.assert_close(one.attend(attend_reference), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_rounds_once(dtype: torch.dtype) -> None:
    one = case(HEADS, STEPS["chunks-and-decoding"], dtype=dtype)
    expected = oracle(one, STEPS["chunks-and-decoding"]).to(dtype)
    torch.testing.assert_close(one.attend(attend_reference), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_flex(kind: str, step: str) -> None:
    one = case(KINDS[kind], STEPS[step], size=16)
    with torch.inference_mode():
        computed = one.attend(make_flex(eager_flex))
    torch.testing.assert_close(computed, one.attend(attend_reference), rtol=0, atol=2e-5)


def eager_flex(*args: Any, **options: Any) -> Tensor:
    """FlexAttention as its authors debug it: the same mask and scores, not fused."""
    import torch.nn.attention.flex_attention as flex

    before = flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        out = flex.flex_attention(*args, **options)
        assert isinstance(out, Tensor)
        return out
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
