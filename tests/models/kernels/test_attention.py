"""Rotary positions, cache writes and attention against their PyTorch twins."""

import pytest
import torch

from tgis.models.kernels import reference

SHAPES = [  # (query heads, KV heads), head size
    ((4, 4), 8),
    ((6, 2), 16),
    ((5, 1), 32),
    ((6, 2), 64),
    ((16, 2), 64),
    ((2, 2), 64),
    ((4, 1), 80),
    ((7, 1), 96),
    ((6, 2), 128),
    ((3, 1), 256),
]
SLOTS, SLOT_TOKENS = 4, 600


def close(actual: torch.Tensor, expected: torch.Tensor, exact: float = 1e-5) -> None:
    tolerance = exact if expected.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def caches(kv_heads, head_dim, dtype, generator, slot_tokens=SLOT_TOKENS):
    shape = (2, SLOTS, kv_heads, slot_tokens, head_dim)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def batch(lengths):
    """(new tokens, length) per sequence -> slots, q_start, kv_len; slots are not in order."""
    q_len = torch.tensor([0] + [new for new, _ in lengths])
    slots = torch.arange(len(lengths)).flip(0) % SLOTS
    kv_len = torch.tensor([length for _, length in lengths])
    return slots.int(), q_len.cumsum(0).int(), kv_len.int()


def check(native, dtype, generator, heads, head_dim, lengths, **options) -> None:
    k, v = caches(heads[1], head_dim, dtype, generator)
    slots, q_start, kv_len = batch(lengths)
    q = torch.randn((int(q_start[-1]), heads[0], head_dim), generator=generator).to(dtype)
    arguments = (q, k, v, slots, q_start, kv_len, head_dim**-0.5)
    actual = native.attention(*arguments, **options)
    close(actual, reference.attention(*arguments, **options))


DECODE = [(1, 1), (1, 2), (1, 17), (1, 255), (1, 256), (1, 257), (1, 599)]
MIXED = [(1, 30), (7, 7), (0, 40), (3, 300), (33, 290), (1, 1), (40, 40)]


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES, ids=str)
def test_decode(native, dtype, generator, heads, head_dim) -> None:
    check(native, dtype, generator, heads, head_dim, DECODE)


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES, ids=str)
def test_decode_and_prefill_chunks_together(native, dtype, generator, heads, head_dim) -> None:
    check(native, dtype, generator, heads, head_dim, MIXED)


@pytest.mark.parametrize("window", [1, 5, 16, 256, 300])
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_window(native, dtype, generator, window, lengths) -> None:
    check(native, dtype, generator, (6, 2), 32, lengths, window=window)


@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_alibi(native, dtype, generator, lengths) -> None:
    slopes = 2.0 ** -torch.arange(1, 7).float()
    check(native, dtype, generator, (6, 2), 64, lengths, alibi_slopes=slopes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("middle", [0, 3, 128])
def test_relative_bias(native, dtype, generator, causal, middle) -> None:
    bias = torch.randn((6, 2 * middle + 1), generator=generator)
    check(native, dtype, generator, (6, 6), 64, MIXED, bias=bias, causal=causal)


def test_every_key_is_seen_without_causality(native, dtype, generator) -> None:
    lengths = [(5, 300), (300, 5), (1, 1), (2, 0)]
    check(native, dtype, generator, (4, 4), 64, lengths, causal=False)


@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_softcap(native, dtype, generator, lengths) -> None:
    check(native, dtype, generator, (4, 2), 64, lengths, softcap=2.0, window=40)


def test_large_scores_do_not_overflow(native, dtype, generator) -> None:
    k, v = caches(1, 64, dtype, generator)
    slots, q_start, kv_len = batch([(1, 600), (4, 100)])
    q = (torch.randn((5, 2, 64), generator=generator) * 100).to(dtype)
    arguments = (q, k, v, slots, q_start, kv_len, 1.0)
    # a score of 3000 itself is only good to 2e-4 in float32
    close(native.attention(*arguments), reference.attention(*arguments), exact=2e-3)


@pytest.mark.parametrize("length", [30, 400])
def test_a_sequence_does_not_depend_on_its_neighbours(native, dtype, generator, length) -> None:
    k, v = caches(2, 64, dtype, generator)
    q = torch.randn((9, 6, 64), generator=generator).to(dtype)
    slots, q_start, kv_len = batch([(1, 590), (7, 90), (1, length)])
    together = native.attention(q, k, v, slots, q_start, kv_len, 0.1)[8:]
    slots, q_start, kv_len = slots[2:], torch.tensor([0, 1]).int(), kv_len[2:]
    assert torch.equal(together, native.attention(q[8:], k, v, slots, q_start, kv_len, 0.1))


def test_threads_do_not_change_results(native, dtype, generator, threads) -> None:
    k, v = caches(2, 64, dtype, generator)
    slots, q_start, kv_len = batch([*MIXED, *DECODE])
    q = torch.randn((int(q_start[-1]), 6, 64), generator=generator).to(dtype)
    alone = native.attention(q, k, v, slots, q_start, kv_len, 0.1)
    threads(3)
    assert torch.equal(alone, native.attention(q, k, v, slots, q_start, kv_len, 0.1))


def test_memory_beyond_a_length_is_not_read(native, dtype, generator) -> None:
    k, v = caches(2, 80, dtype, generator)
    slots, q_start, kv_len = batch([(1, 13), (5, 290)])
    q = torch.randn((6, 4, 80), generator=generator).to(dtype)
    expected = native.attention(q, k, v, slots, q_start, kv_len, 0.1)
    for slot, length in zip(slots.tolist(), kv_len.tolist(), strict=True):
        k[slot, :, length:] = v[slot, :, length:] = float("nan")
    assert torch.equal(expected, native.attention(q, k, v, slots, q_start, kv_len, 0.1))


@pytest.mark.parametrize(
    ("slots", "q_start", "kv_len"),
    [
        ([SLOTS], [0, 1], [4]),
        ([-1], [0, 1], [4]),
        ([0], [0, 1], [SLOT_TOKENS + 1]),
        ([0], [0, 1], [0]),
        ([0], [0, 2], [4]),
        ([0], [1, 1], [4]),
        ([0, 1], [0, 2, 1], [4, 4]),
    ],
)
def test_indices_outside_are_refused(native, generator, slots, q_start, kv_len) -> None:
    k, v = caches(2, 16, torch.float32, generator)
    indices = (torch.tensor(x, dtype=torch.int32) for x in (slots, q_start, kv_len))
    with pytest.raises(IndexError, match="outside"):
        native.attention(torch.zeros(1, 2, 16), k, v, *indices, 1.0)


@pytest.mark.parametrize("rotation", ["none", "half", "interleaved"])
def test_rope_store(native, dtype, generator, rotation) -> None:
    for heads, head_dim in [*SHAPES, ((0, 3), 64)]:
        check_rope_store(native, dtype, generator, heads, head_dim, rotation)


def check_rope_store(native, dtype, generator, heads, head_dim, rotation) -> None:
    tokens, half = 7, head_dim // 4 if rotation == "interleaved" else head_dim // 2
    k, v = caches(heads[1], head_dim, dtype, generator, slot_tokens=20)
    twin_k, twin_v = k.clone(), v.clone()
    width = (heads[0] + 2 * heads[1]) * head_dim
    qkv = torch.randn((tokens, width), generator=generator).to(dtype)
    angle = torch.randn((tokens, half), generator=generator)
    cos, sin = (None, None) if rotation == "none" else (angle.cos(), angle.sin())
    slot = torch.tensor([3, 3, 3, 0, 0, 2, 1], dtype=torch.int32)
    position = torch.tensor([0, 1, 2, 18, 19, 7, 0], dtype=torch.int32)
    options = {"interleaved": rotation == "interleaved"}
    if rotation == "half":
        weights = torch.randn((2, head_dim), generator=generator).to(dtype)
        options |= {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-5}
    q = native.rope_store(qkv, cos, sin, k, v, slot, position, *heads, **options)
    twin = reference.rope_store(qkv, cos, sin, twin_k, twin_v, slot, position, *heads, **options)
    for actual, expected in ((q, twin), (k, twin_k), (v, twin_v)):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(("slot", "position"), [(SLOTS, 0), (-1, 0), (0, 20), (0, -1)])
def test_a_token_outside_the_cache_is_refused(native, generator, slot, position) -> None:
    k, v = caches(2, 8, torch.float32, generator, slot_tokens=20)
    before = k.clone()
    slots = torch.tensor([0, slot], dtype=torch.int32)
    positions = torch.tensor([0, position], dtype=torch.int32)
    with pytest.raises(IndexError, match="outside"):
        native.rope_store(torch.zeros(2, 48), None, None, k, v, slots, positions, 2, 2)
    assert torch.equal(k, before)


def test_wrong_shapes_are_refused(native, generator) -> None:
    k, v = caches(2, 8, torch.float32, generator, slot_tokens=20)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="columns"):
        native.rope_store(torch.zeros(1, 40), None, None, k, v, index, index, 2, 2)
    with pytest.raises(ValueError, match="token_slot"):
        native.rope_store(torch.zeros(1, 48), None, None, k, v, index.long(), index, 2, 2)
    with pytest.raises(ValueError, match="caches must be"):
        native.rope_store(torch.zeros(1, 48).bfloat16(), None, None, k, v, index, index, 2, 2)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        native.attention(torch.zeros(1, 3, 8), k, v, index, starts, starts[1:], 1.0)
    with pytest.raises(ValueError, match="q must be contiguous"):
        native.attention(torch.zeros(1, 2, 16), k, v, index, starts, starts[1:], 1.0)
