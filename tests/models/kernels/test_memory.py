"""No kernel reads or writes beyond a tensor: each lies right before a page that traps."""

import subprocess
import sys

import pytest

from tgis.models.kernels import build

CODE = """
import ctypes, mmap, sys, torch
from tgis.models.kernels import native

torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
held = []

def guarded(x):
    pages = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    held.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    place = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - x.nbytes)
    return place.view(x.shape).copy_(x)

native._empty = lambda shape, dtype: guarded(torch.empty(shape, dtype=dtype))
int32 = lambda *values: guarded(torch.tensor(values, dtype=torch.int32))

for dtype in (torch.float32, torch.bfloat16):
    make = lambda *shape: guarded(torch.randn(shape).to(dtype))
    for rows, cols in [(1, 1), (3, 17), (5, 100), (2, 768)]:
        native.rms_norm(make(rows, cols), make(cols), 1e-6, make(rows, cols))
        native.layer_norm(make(rows, cols), make(cols), make(cols), 1e-6)
        native.act_mul(make(rows, 2 * cols), "gelu")
        native.quantize_rows(make(rows, cols))
        native.scale_rows_(make(rows, cols), guarded(torch.rand(rows)), make(cols))
        native.argmax(make(rows, cols))
    shapes = [(3, 1, 16, 5), (4, 2, 80, 33), (6, 2, 64, 300), (2, 2, 2, 9)]
    for heads, kv_heads, dim, tokens in shapes:
        k, v = make(2, kv_heads, tokens, dim), make(2, kv_heads, tokens, dim)
        half = guarded(torch.rand(2, dim // 2))
        qkv = make(2, (heads + 2 * kv_heads) * dim)
        places = int32(0, tokens - 1)
        native.rope_store(qkv, half, half, k, v, int32(0, 1), places, heads, kv_heads)
        for new in (1, 3, 5, 40):
            if new <= tokens:
                q = make(new + 1, heads, dim)
                index = int32(0, 1), int32(0, 1, new + 1), int32(7 % tokens + 1, tokens)
                slopes = guarded(torch.rand(heads))
                bias = guarded(torch.rand(heads, 5))
                native.attention(q, k, v, *index, 0.1)
                native.attention(q, k, v, *index, 0.1, alibi_slopes=slopes, bias=bias, window=9)
for rows in (1, 16, 17, 33, 50):
    x = guarded(torch.randn(rows, 64).bfloat16())
    scale, bias = guarded(torch.rand(64)), guarded(torch.rand(64).bfloat16())
    bf16, int8 = guarded(torch.rand(64, 64).bfloat16()), guarded(torch.ones(64, 64).to(torch.int8))
    for weight, factor in ((bf16, None), (int8, scale)):
        for out in (torch.float32, torch.bfloat16):
            for features in (64, 61, 33):
                parts = factor if factor is None else guarded(factor[:features].clone())
                added = guarded(bias[:features].clone())
                for y in (x, x.float()) if factor is not None else (x,):
                    kinds = guarded(added.to(y.dtype)), y.dtype, out
                    layer = native.amx_linear(weight.data_ptr(), features, 64, parts, *kinds)
                    if layer is not None:
                        layer(guarded(y))
print("done")
"""


def test_nothing_is_touched_beyond_a_tensor() -> None:
    try:
        build.find_or_compile()
    except build.BuildError as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
