"""The kernels in plain PyTorch: their definition, their tests' oracle, and the fallback.

Everything is computed in float32 and rounded once, when it is stored.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tgis.models.kernels.grouped_pack import Pack

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual.add_(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMS norm of rows (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [T, K], bfloat16 or float32; rows may lie apart.
        weight: [K], of x's type.
        eps: added to the mean of squares.
        residual: [T, K], or None. Where given, it becomes residual + x in place, and that sum is
            what is normalised.

    Returns:
        [T, K], contiguous.
    """
    y = _add_residual(x, residual).float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer norm of rows: (x - mean) / sqrt(variance + eps) * weight + bias.

    As `rms_norm`; `weight` and `bias` may be None.
    """
    y = _add_residual(x, residual).float()
    w = None if weight is None else weight.float()
    b = None if bias is None else bias.float()
    return F.layer_norm(y, y.shape[-1:], w, b, eps).to(x.dtype)


def act_mul(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up for a gated MLP.

    Args:
        gate_up: [T, 2 * I]: gate, then up, in each row; rows may lie apart.
        activation: "silu", "gelu" (by erf), "gelu_tanh" or "relu".

    Returns:
        [T, I], contiguous.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (_ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)


def act(x: Tensor, activation: str) -> Tensor:
    """activation(x) of [T, I]; see `act_mul`."""
    return _ACTIVATIONS[activation](x.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = (*turned.shape[:-1], half, 2) if interleaved else (*turned.shape[:-1], 2, half)
    axis = -1 if interleaved else -2
    a, b = turned.reshape(pairs).unbind(axis)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2)
    return torch.cat((out, rest), -1)


def _head_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rope_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    token_slot: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One pass over a fused projection: q/k norm, rotary positions, keys and values to the cache.

    Args:
        qkv: [T, (H + 2 * Hkv) * D], bfloat16 or float32; rows may lie apart.
        cos, sin: [T, R / 2] float32 for the tokens' positions, where R <= D are the leading
            elements of a head that rotate (RoFormer, Su et al. 2021); None rotates nothing.
        k_cache, v_cache: [slots, Hkv, slot_tokens, D], of qkv's type; written.
        token_slot, positions: [T] int32, where each token's key and value go.
        num_heads, num_kv_heads: H and Hkv. H may be 0 (nothing but keys and values).
        interleaved: element 2i rotates with 2i + 1 (GPT-J), else i with i + R / 2 (NeoX).
        q_norm, k_norm: [D] of qkv's type: RMS norm of each head before the rotation (Qwen3).
        eps: of that norm.

    Returns:
        q, [T, H, D].

    Raises:
        IndexError: a token lies outside the caches; nothing is written then.
    """
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q = _head_norm(q.float(), q_norm, eps)
    k = _head_norm(k.float(), k_norm, eps)
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    slots, places = token_slot.long(), positions.long()
    k_cache[slots, :, places] = k.to(k_cache.dtype)
    v_cache[slots, :, places] = v.to(v_cache.dtype)
    return q.to(qkv.dtype)


def _visible(
    q_len: int, kv_len: int, window: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which keys each query sees, and each key's position relative to the query's."""
    query = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    distance = torch.arange(kv_len, device=device)[None, :] - query
    visible = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        visible = visible & (distance > -window)
    return visible, distance


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    *,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Softmax attention of new tokens over what the cache holds for their sequences.

    Args:
        q: [T, H, D]: the new tokens of S sequences, one sequence after the other.
        k_cache, v_cache: [slots, Hkv, slot_tokens, D], of q's type; D <= 256, H a multiple of Hkv.
            Query head h reads KV head h // (H / Hkv).
        slots: [S] int32: where each sequence's keys and values lie.
        q_start: [S + 1] int32: sequence s owns rows q_start[s] .. q_start[s + 1] of q.
        kv_len: [S] int32: its keys, those of its new tokens included. The new tokens are the last
            of them, and each sees the keys up to its own position.
        scale: multiplies q.k.
        alibi_slopes: [H] float32: adds slope * (key position - query position) (Press et al. 2021).
        window: a query sees only the last `window` positions, its own included; 0 = all.
        bias: [H, 2 * M + 1] float32: adds bias[h, M + d], d = key position - query position,
            clamped to -M .. M (T5's relative bias).
        softcap: s becomes softcap * tanh(s / softcap) before bias and mask (Gemma 2); 0 = off.
        causal: False lets every query see every key (encoders, cross attention).

    Returns:
        [T, H * D]. A query that sees nothing gets zeros.

    Raises:
        IndexError: a slot or length lies outside the tensors.
    """
    tokens = len(q)
    out = torch.zeros_like(q)
    starts = q_start.tolist()
    for s, (slot, length) in enumerate(zip(slots.tolist(), kv_len.tolist(), strict=True)):
        rows = slice(starts[s], starts[s + 1])
        if rows.start == rows.stop or length == 0:
            continue
        keys, values = k_cache[slot, :, :length], v_cache[slot, :, :length]
        out[rows] = attend(
            q[rows],
            keys,
            values,
            scale,
            alibi_slopes=alibi_slopes,
            window=window,
            bias=bias,
            softcap=softcap,
            causal=causal,
        )
    return out.view(tokens, -1)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """`attention` of one sequence, on any device and without waiting for it.

    Args:
        q: [n, H, D], its new tokens.
        keys, values: [Hkv, its tokens, D].

    Returns:
        [n, H, D], of q's type.
    """
    group = q.shape[1] // len(keys)
    keys = keys.float().repeat_interleave(group, 0)
    values = values.float().repeat_interleave(group, 0)
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    visible, distance = _visible(len(q), keys.shape[1], window, causal, q.device)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * distance
    if bias is not None:
        middle = bias.shape[1] // 2
        scores = scores + bias[:, distance.clamp(-middle, middle) + middle]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, K] of bfloat16 or float32 as int8, symmetric: x is about q * scale.

    Returns:
        q [T, K] int8 in -127 .. 127, and scale [T] float32 = max |x| / 127 of each row.
    """
    values = x.float()
    most = values.abs().amax(-1, keepdim=True) if x.shape[1] else values.new_zeros(len(x), 1)
    inverse = torch.where(most > 0, 127.0 / most, 0.0)
    return (values * inverse).round().to(torch.int8), (most / 127.0).squeeze(1)


def scale_rows_(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] * scale [T] + bias [K], in place; returns x."""
    scaled = x.float() * scale[:, None]
    return x.copy_(scaled if bias is None else scaled + bias.float())


def argmax(logits: Tensor) -> Tensor:
    """The first index of each row's largest element, int64 [N], of [N, V]; a NaN counts as it."""
    if logits.shape[1] == 0:
        raise ValueError("logits must have columns")
    return logits.argmax(-1)


def amx_linear(
    address: int,
    out_features: int,
    in_features: int,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Callable[[Tensor], Tensor] | None:
    """A layer on weights that oneDNN has packed (see `linear`).

    Args:
        address: of the pack, which the caller keeps alive, as it keeps `scale` and `bias`.
        scale: [out_features] float32 for int8 weights; None for bfloat16 ones.
        bias: [out_features], or None.
        dtype: of x and bias: bfloat16, or float32 beside int8 weights.
        out_dtype: bfloat16 or float32.

    Returns:
        x [T, in_features] -> [T, out_features]; None where there is no such kernel, as in PyTorch.
    """
    return None


def grouped_product(
    weight: Pack, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """A layer on weights of 4 or 8 bits with groups (see `quant.grouped`).

    Args:
        weight: packed.
        bias: [out_features], or None.
        dtype: of x and bias: bfloat16 or float32.
        out_dtype: bfloat16 or float32.

    Returns:
        x [T, cols] -> [T, out_features]; None where there is no such kernel, as in PyTorch.
    """
    return None


def replayed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tensors, recorded for each key when first called, replayed in one go after.

    Args:
        function: called with the inputs. It must compute by the functions of `models.kernels`
            alone, besides taking views, and must not decide by the content of tensors. Where it
            calls another operator it is not recorded, and always just called.

    Returns:
        (key, *inputs) -> function(*inputs), valid until the next call. The key decides what is
        called, with which shapes: the number of rows, for example. Inputs are contiguous tensors of
        the same shapes and types whenever the key is the same, or None. The function may write to
        inputs; whether the caller sees that is undefined.
    """
    return lambda key, *inputs: function(*inputs)
