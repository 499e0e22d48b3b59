"""The C kernels behind Python functions: checks of the arguments, then one call each.

A kernel takes a pointer to one struct of 8-byte fields; packing it and calling through ctypes costs
0.4 microseconds, where 14 separate arguments cost 1.3.
"""

import ctypes
import time
from collections.abc import Callable
from struct import Struct

import torch
from torch import Tensor

from tgis.models.kernels.build import find_or_compile
from tgis.quant import tiles

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_ERRORS: dict[int, Callable[[], Exception]] = {
    -1: lambda: MemoryError("no memory for a kernel's scratch"),
    -2: lambda: IndexError("slots, positions or lengths lie outside the tensors"),
}

_recording: list["Recording"] = []  # the one under way, or none
_timing: list["Timing"] = []  # likewise
NAMES: dict[int, str] = {}  # address of a C function -> its name


class Recording:
    """What `replay.Replay` learns of the kernels' calls: functions, arguments, memory."""

    def __init__(self, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> None:
        self.calls: list[tuple[int, bytes]] = []  # address of the C function, its struct
        self.empty = empty

    def __enter__(self) -> "Recording":
        _recording.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _recording.remove(self)


class Timing:
    """While entered, notes what each kernel takes, called or replayed, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []  # name, seconds

    def __enter__(self) -> "Timing":
        _timing.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _timing.remove(self)


def timing() -> Timing | None:
    """The one under way."""
    return _timing[0] if _timing else None


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if _recording:
        return _recording[0].empty(shape, dtype)
    return tiles.empty(*shape, dtype) if len(shape) == 2 else torch.empty(shape, dtype=dtype)


_LIBRARY = ctypes.CDLL(str(find_or_compile()))


def _kernel(name: str, fields: str) -> Callable[..., None]:
    """A C function as a Python one; `fields`: of its struct, p(ointer), i(nteger) or d(ouble)."""
    pack = Struct("@" + fields.replace("p", "q").replace("i", "q")).pack
    function = getattr(_LIBRARY, name)
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    NAMES[address] = name

    def call(*arguments: float) -> None:
        struct = pack(*arguments)
        if _recording:
            _recording[0].calls.append((address, struct))
        start = time.perf_counter() if _timing else 0.0
        error = function(struct)
        if start and name != "tgis_replay":  # which has noted its calls one by one
            _timing[0].calls.append((name, time.perf_counter() - start))
        if error:
            raise _ERRORS[error]()

    return call


_norm = _kernel("tgis_norm", "ppppp iii ii d")
_activation = _kernel("tgis_activation", "pp iii iii")
_rope_store = _kernel("tgis_rope_store", "p pp p pp pp pp iiii iiii ii ii d")
_HAS_AMX = bool(_LIBRARY.tgis_amx(None))  # built for it, and the operating system lets us
_quantize_rows = _kernel("tgis_quantize_rows", "ppp iiii")
_scale_rows = _kernel("tgis_scale_rows", "ppp iii")
_argmax = _kernel("tgis_argmax", "pp iiii")
_linear_bf16 = _kernel("tgis_linear_bf16", "ppppp iii ii")
_linear_int8 = _kernel("tgis_linear_int8", "ppppp iii ii")
replay = _kernel("tgis_replay", "ppp ii")
_attention = _kernel("tgis_attention", "pppp ppp pp iii iii ii ii i i i dd")


def _rows(x: Tensor, name: str) -> None:
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"{name} must have 2 dimensions and contiguous rows")


def _like(x: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The address of a tensor that must have this shape and type and be contiguous; 0 for None."""
    if x is None:
        return 0
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)}, not {x.dtype} {list(x.shape)}"
        )
    return x.data_ptr()


def _flag(x: Tensor, name: str) -> int:
    try:
        return _DTYPES[x.dtype]
    except KeyError:
        raise ValueError(f"{name} must be float32 or bfloat16, not {x.dtype}") from None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """See `reference.rms_norm`."""
    return _normalise(x, weight, None, eps, residual, center=0)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """See `reference.layer_norm`."""
    return _normalise(x, weight, bias, eps, residual, center=1)


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    center: int,
) -> Tensor:
    _rows(x, "x")
    rows, cols = x.shape
    out = _empty((rows, cols), x.dtype)
    _norm(
        x.data_ptr(),
        _like(residual, "residual", (rows, cols), x.dtype),
        _like(weight, "weight", (cols,), x.dtype),
        _like(bias, "bias", (cols,), x.dtype),
        out.data_ptr(),
        rows,
        cols,
        x.stride(0),
        _flag(x, "x"),
        center,
        eps,
    )
    return out


def act_mul(gate_up: Tensor, activation: str) -> Tensor:
    """See `reference.act_mul`."""
    if gate_up.shape[-1] % 2:
        raise ValueError("gate_up must have an even number of columns")
    return _activate(gate_up, activation, gate_up.shape[-1] // 2, gated=1)


def act(x: Tensor, activation: str) -> Tensor:
    """See `reference.act`."""
    return _activate(x, activation, x.shape[-1], gated=0)


def _activate(x: Tensor, activation: str, cols: int, gated: int) -> Tensor:
    _rows(x, "x")
    rows = x.shape[0]
    out = _empty((rows, cols), x.dtype)
    kind = _ACTIVATIONS[activation]
    _activation(x.data_ptr(), out.data_ptr(), rows, cols, x.stride(0), kind, gated, _flag(x, "x"))
    return out


def _check_caches(k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype) -> None:
    head_dim = k_cache.shape[3]
    if k_cache.dtype != dtype or v_cache.dtype != dtype:
        raise ValueError(f"the caches must be {dtype}, not {k_cache.dtype} and {v_cache.dtype}")
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        raise ValueError("the two caches must have one layout")
    if k_cache.stride()[2:] != (head_dim, 1) or not 0 < head_dim <= 256:
        raise ValueError("a head's tokens must lie contiguous in the caches, of 1 to 256 elements")


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
    """See `reference.rope_store`."""
    _rows(qkv, "qkv")
    dtype = qkv.dtype
    _check_caches(k_cache, v_cache, dtype)
    tokens, width = qkv.shape
    slots, cache_heads, slot_tokens, head_dim = k_cache.shape
    if width != (num_heads + 2 * num_kv_heads) * head_dim or cache_heads != num_kv_heads:
        raise ValueError(
            f"qkv of {width} columns is not {num_heads} + 2 * {num_kv_heads} heads of {head_dim}, "
            f"or the caches of {cache_heads} heads do not fit"
        )
    half = 0 if cos is None else cos.shape[1]
    if 2 * half > head_dim or (cos is None) != (sin is None):
        raise ValueError("cos and sin must come together, for at most the elements of a head")
    q = _empty((tokens, num_heads, head_dim), dtype)
    _rope_store(
        qkv.data_ptr(),
        _like(cos, "cos", (tokens, half), torch.float32),
        _like(sin, "sin", (tokens, half), torch.float32),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        _like(token_slot, "token_slot", (tokens,), torch.int32),
        _like(positions, "positions", (tokens,), torch.int32),
        _like(q_norm, "q_norm", (head_dim,), dtype),
        _like(k_norm, "k_norm", (head_dim,), dtype),
        tokens,
        qkv.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        2 * half,
        0 if cos is None else 2 if interleaved else 1,
        _flag(qkv, "qkv"),
        slots,
        slot_tokens,
        k_cache.stride(0),
        k_cache.stride(1),
        eps,
    )
    return q


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
    """See `reference.attention`."""
    dtype = q.dtype
    _check_caches(k_cache, v_cache, dtype)
    num_slots, kv_heads, slot_tokens, head_dim = k_cache.shape
    tokens, heads, _ = q.shape
    seqs = slots.shape[0]
    bias_len = 0 if bias is None else bias.shape[1]
    if heads % kv_heads or (bias is not None and bias_len % 2 == 0):
        raise ValueError("H must be a multiple of Hkv, and bias must have an odd number of columns")
    out = _empty((tokens, heads * head_dim), dtype)
    _attention(
        _like(q, "q", (tokens, heads, head_dim), dtype),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        _like(slots, "slots", (seqs,), torch.int32),
        _like(q_start, "q_start", (seqs + 1,), torch.int32),
        _like(kv_len, "kv_len", (seqs,), torch.int32),
        _like(alibi_slopes, "alibi_slopes", (heads,), torch.float32),
        _like(bias, "bias", (heads, bias_len), torch.float32),
        tokens,
        seqs,
        heads,
        kv_heads,
        head_dim,
        _flag(q, "q"),
        num_slots,
        slot_tokens,
        k_cache.stride(0),
        k_cache.stride(1),
        bias_len,
        window,
        int(causal),
        scale,
        softcap,
    )
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_rows`."""
    _rows(x, "x")
    rows, cols = x.shape
    q = _empty((rows, cols), torch.int8)
    scale = _empty((rows,), torch.float32)
    _quantize_rows(
        x.data_ptr(), q.data_ptr(), scale.data_ptr(), rows, cols, x.stride(0), _flag(x, "x")
    )
    return q, scale


def scale_rows_(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.scale_rows_`."""
    rows, cols = x.shape
    _scale_rows(
        _like(x, "x", (rows, cols), x.dtype),
        _like(scale, "scale", (rows,), torch.float32),
        _like(bias, "bias", (cols,), x.dtype),
        rows,
        cols,
        _flag(x, "x"),
    )
    return x


def argmax(logits: Tensor) -> Tensor:
    """See `reference.argmax`."""
    _rows(logits, "logits")
    rows, cols = logits.shape
    if cols == 0:
        raise ValueError("logits must have columns")
    out = _empty((rows,), torch.int64)
    _argmax(
        logits.data_ptr(), out.data_ptr(), rows, cols, logits.stride(0), _flag(logits, "logits")
    )
    return out


def amx_linear(
    address: int,
    out_features: int,
    in_features: int,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Callable[[Tensor], Tensor] | None:
    """See `reference.amx_linear`."""
    if not _HAS_AMX or (scale is None and dtype != torch.bfloat16):
        return None
    run = _linear_bf16 if scale is None else _linear_int8
    scale_address = _like(scale, "scale", (out_features,), torch.float32)
    bias_address = _like(bias, "bias", (out_features,), dtype)
    x_bf16, out_bf16 = _DTYPES[dtype], _DTYPES[out_dtype]

    def linear(x: Tensor) -> Tensor:
        rows, cols = x.shape
        if cols != in_features or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(f"x must be contiguous {dtype} [rows, {in_features}]")
        out = _empty((rows, out_features), out_dtype)
        run(
            x.data_ptr(),
            address,
            scale_address,
            bias_address,
            out.data_ptr(),
            rows,
            in_features,
            out_features,
            x_bf16,
            out_bf16,
        )
        return out

    return linear
