"""Packed linear layers, on our kernel and on oneDNN's, against plain products."""

import pytest
import torch
from torch.nn import functional

from tgis.models.kernels import linear

ROWS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 50, 64, 65, 130, 600]
SHAPES = [(64, 64), (192, 256), (1088, 64), (128, 1024), (100, 64), (65, 128), (64, 40), (17, 9)]


def make(shape, rows, generator):
    weight = torch.randn(shape, generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16()
    return torch.randn((rows, shape[1]), generator=generator).bfloat16(), weight, bias


@pytest.fixture
def bound(native, monkeypatch):
    """The layers on the kernels of one target."""
    for name in ("amx_linear", "quantize_rows", "scale_rows_"):
        monkeypatch.setattr(linear.kernels, name, getattr(native, name))
    return linear


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_linear(bound, generator, shape, with_bias) -> None:
    _, weight, bias = make(shape, 0, generator)
    bias = bias if with_bias else None
    layer = bound.bf16_linear(weight, bias)
    for rows in ROWS:
        x = torch.randn((rows, shape[1]), generator=generator).bfloat16()
        assert layer(x).is_contiguous()
        expected = functional.linear(
            x.float(), weight.float(), None if bias is None else bias.float()
        )
        scale = shape[1] ** 0.5
        torch.testing.assert_close(layer(x).float(), expected, rtol=2**-8, atol=2**-14 * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_linear(bound, generator, shape, with_bias) -> None:
    _, weight, bias = make(shape, 0, generator)
    bias = bias if with_bias else None
    layer = bound.int8_linear(weight, bias)
    w, w_scale = linear.kernels.quantize_rows(weight)
    for rows in ROWS:
        x = torch.randn((rows, shape[1]), generator=generator).bfloat16()
        q, x_scale = linear.kernels.quantize_rows(x)
        sums = q.double() @ w.double().T
        expected = sums * x_scale[:, None] * w_scale
        expected = expected if bias is None else expected + bias
        # oneDNN's product is rounded to bfloat16 before the rows' scales are applied
        torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("make_layer", ["bf16_linear", "int8_linear"])
def test_a_row_does_not_depend_on_its_neighbours(bound, generator, make_layer) -> None:
    x, weight, bias = make((192, 256), 40, generator)
    layer = getattr(bound, make_layer)(weight, bias)
    together = layer(x)
    for row in (0, 15, 16, 39):
        assert torch.equal(together[row : row + 1], layer(x[row : row + 1]))


def test_threads_do_not_change_results(bound, generator, threads) -> None:
    x, weight, bias = make((1024, 256), 40, generator)
    layers = [bound.bf16_linear(weight, bias), bound.int8_linear(weight, bias)]
    alone = [layer(x) for layer in layers]
    threads(3)
    for layer, expected in zip(layers, alone, strict=True):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("make_layer", ["bf16_linear", "int8_linear"])
def test_float32_comes_out_unrounded(bound, generator, make_layer) -> None:
    x, weight, bias = make((100, 256), 9, generator)
    rounded = getattr(bound, make_layer)(weight, bias)(x)
    y = getattr(bound, make_layer)(weight, bias, torch.float32)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.bfloat16(), rounded, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("shape", [(192, 256), (65, 128), (17, 9)], ids=str)
def test_int8_of_float32(bound, generator, shape) -> None:
    x, weight, bias = (t.float() for t in make(shape, 40, generator))
    y = bound.int8_linear(weight, bias)(x)
    q, x_scale = linear.kernels.quantize_rows(x)
    w, w_scale = linear.kernels.quantize_rows(weight)
    expected = (q.double() @ w.double().T) * x_scale[:, None] * w_scale + bias
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_wrong_rows_are_refused(bound, generator) -> None:
    x, weight, bias = make((64, 64), 4, generator)
    layer = bound.bf16_linear(weight, bias)
    with pytest.raises((ValueError, RuntimeError)):
        layer(x[:, :32].contiguous())
    with pytest.raises((ValueError, RuntimeError)):
        layer(x.float())


def test_an_unknown_pack_is_not_read(native, generator) -> None:
    weight = torch.randn((64, 64), generator=generator).bfloat16()
    other = torch.randn((64, 64), generator=generator).bfloat16()
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, 128)
    assert linear._is_expected(blocked, weight, 32)
    assert not linear._is_expected(blocked, other, 32)


def test_int8_loses_little(bound, generator) -> None:
    x, weight, _ = make((128, 1024), 8, generator)
    exact = x.float() @ weight.float().T
    error = (bound.int8_linear(weight)(x).float() - exact).norm() / exact.norm()
    assert error < 0.015
