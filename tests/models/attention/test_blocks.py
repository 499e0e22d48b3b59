"""Attention over block tables: the reference against SDPA, every back end against the reference."""

import inspect
import sys
import types
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from tgis.errors import ConfigError
from tgis.models.attention import backends
from tgis.models.attention.alibi import alibi_slopes
from tgis.models.attention.backends import BACKENDS, Needs, choose_backend
from tgis.models.attention.blocks import Attend, attend_reference
from tgis.models.attention.flex import make_flex
from tgis.models.attention.heads import Heads
from tgis.models.attention.packages import load_flash_attn, load_flashinfer, load_varlen
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


def needs(**changes: Any) -> Needs:
    usual = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, "alibi": False}
    return Needs(**usual | changes)


CUDA = torch.device("cuda", 0)
INSTALLED = ("flash_attn", "flash_attn_interface", "flashinfer", "triton")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be there; back ends are not loaded."""
    found = set(INSTALLED)
    monkeypatch.setattr(backends, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, backend in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, backend._replace(load=lambda: attend_reference))
    return found


def test_the_best_back_end_that_fits_is_chosen(installed: set[str]) -> None:
    assert choose_backend(None, needs()).name == "varlen"
    assert choose_backend(None, needs(alibi=True)).name == "flash_attn"
    assert choose_backend(None, needs(dtype=torch.float32)).name == "triton"
    assert choose_backend(None, needs(head_dim=260)).name == "triton"
    installed -= {"flash_attn_interface"}
    assert choose_backend(None, needs()).name == "flash_attn"
    installed -= {"flash_attn"}
    assert choose_backend(None, needs()).name == "flashinfer"
    assert choose_backend(None, needs(alibi=True)).name == "triton"
    installed -= {"flashinfer"}
    assert choose_backend(None, needs()).name == "triton"
    assert choose_backend("flex", needs()).name == "flex"
    installed.clear()
    assert choose_backend(None, needs()).name == "reference"
    assert choose_backend(None, needs(device=CPU)).name == "reference"
    assert choose_backend("flex", needs(device=CPU)).name == "flex"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("varlen", {"device": CPU}, "it needs a CUDA device"),
        ("flash_attn", {"dtype": torch.float32}, r"it does not compute in torch.float32"),
        ("flashinfer", {"alibi": True}, "it has no ALiBi"),
        ("flash_attn", {"head_dim": 20}, "it has no heads of 20"),
    ],
)
def test_what_a_back_end_cannot_do(
    installed: set[str], name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"ATTENTION = {name}: {reason}"):
        choose_backend(name, needs(**changes))


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(ConfigError, match="flashinfer is not installed"):
        choose_backend("flashinfer", needs())


def paged(
    one: Case, table: Tensor, lengths: list[int], q_start: list[int], left: int, slopes: Any
) -> Tensor:
    """What the packages' documentation says of keys in pages, causal and aligned to the end."""
    out = []
    for s, length in enumerate(lengths):
        pages = [int(page) for page in table[s][: -(-length // one.k.shape[1])]]
        k, v = (torch.cat([pool[p] for p in pages])[:length] for pool in (one.k, one.v))
        q = one.q[q_start[s] : q_start[s + 1]]
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * one.heads.scale
        i = torch.arange(len(q))[:, None] + length - len(q)
        j = torch.arange(length)[None]
        if slopes is not None:
            scores = scores - slopes[:, None, None] * (i - j).abs()
        hidden = (j > i) | ((j < i - left) if left >= 0 else False)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)))
    return torch.cat(out)


@pytest.mark.parametrize("kind", ["grouped", "window", "alibi-window"])
@pytest.mark.parametrize("step", STEPS)
def test_the_call_of_flash_attn(monkeypatch: pytest.MonkeyPatch, kind: str, step: str) -> None:
    """Against a function with the arguments that its documentation names."""
    one = case(KINDS[kind], STEPS[step])

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Tensor:  # fmt: skip
        lengths = cu_seqlens_k.diff().tolist()
        assert causal
        assert window_size[1] == 0
        assert softmax_scale == one.heads.scale
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), max(lengths))
        starts = cu_seqlens_q.tolist()
        return paged(one, block_table, lengths, starts, window_size[0], alibi_slopes)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    computed, expected = one.attend(load_flash_attn()), one.attend(attend_reference)
    torch.testing.assert_close(computed, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["grouped", "multi-head", "window"])
@pytest.mark.parametrize("step", STEPS)
def test_the_call_of_varlen_attn(monkeypatch: pytest.MonkeyPatch, kind: str, step: str) -> None:
    one, signature = case(KINDS[kind], STEPS[step]), inspect.signature(varlen.varlen_attn)
    activated: list[str] = []

    def stand_in(*args: Any, **options: Any) -> Tensor:
        bound = signature.bind(*args, **options).arguments
        assert bound["enable_gqa"] == (one.heads.num_heads != one.heads.num_kv_heads)
        assert bound["scale"] == one.heads.scale
        assert bound["window_size"][1] == 0
        lengths, starts = bound["seqused_k"].tolist(), bound["cu_seq_q"].tolist()
        assert bound["max_k"] == max(lengths)
        return paged(one, bound["block_table"], lengths, starts, bound["window_size"][0], None)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    computed, expected = one.attend(load_varlen()), one.attend(attend_reference)
    assert activated == ["FA3"]
    torch.testing.assert_close(computed, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["grouped", "window"])
@pytest.mark.parametrize("step", STEPS)
def test_the_call_of_flashinfer(monkeypatch: pytest.MonkeyPatch, kind: str, step: str) -> None:
    one = case(KINDS[kind], STEPS[step])

    class BatchPrefillWithPagedKVCacheWrapper:
        def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
            assert kv_layout == "NHD"
            assert float_workspace_buffer.dtype == torch.uint8

        def plan(
            self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
            paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
            head_dim_qk: int, page_size: int, causal: bool = False, sm_scale: Any = None,
            window_left: int = -1, q_data_type: Any = "float16",
        ) -> None:  # fmt: skip
            assert (num_qo_heads, num_kv_heads, head_dim_qk) == (6, 2, 16)
            assert causal
            assert q_data_type == torch.float32
            pages = paged_kv_indptr.diff().tolist()
            assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
            last = paged_kv_last_page_len.tolist()
            self.lengths = [(n - 1) * page_size + m for n, m in zip(pages, last, strict=True)]
            self.table = paged_kv_indices.split(pages)
            self.starts, self.left = qo_indptr.tolist(), window_left

        def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
            table: Any = self.table
            return paged(one, table, self.lengths, self.starts, self.left, None)

    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = (  # type: ignore[attr-defined]
        BatchPrefillWithPagedKVCacheWrapper
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    computed, expected = one.attend(load_flashinfer()), one.attend(attend_reference)
    torch.testing.assert_close(computed, expected, rtol=0, atol=2e-5)
