"""Norms and activations against their PyTorch twins."""

from types import ModuleType

import pytest
import torch

from tgis.models.kernels import reference


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32 within 1e-5; bfloat16 within one rounding."""
    exact = expected.dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **tolerance)


SHAPES = [(0, 8), (1, 1), (1, 15), (3, 16), (5, 100), (33, 768)]


@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(native, dtype, generator, with_residual) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator).to(dtype)
        weight = torch.randn(shape[1], generator=generator).to(dtype)
        residual = torch.randn(shape, generator=generator).to(dtype) if with_residual else None
        twin = None if residual is None else residual.clone()
        actual = native.rms_norm(x, weight, 1e-6, residual)
        close(actual, reference.rms_norm(x, weight, 1e-6, twin))
        if residual is not None:
            assert torch.equal(residual, twin)


@pytest.mark.parametrize("parts", ["", "w", "wb", "b"])
def test_layer_norm(native, dtype, generator, parts) -> None:
    for shape in SHAPES:
        x = (torch.randn(shape, generator=generator) + 3).to(dtype)
        weight = torch.randn(shape[1], generator=generator).to(dtype) if "w" in parts else None
        bias = torch.randn(shape[1], generator=generator).to(dtype) if "b" in parts else None
        residual = torch.randn(shape, generator=generator).to(dtype)
        twin = residual.clone()
        actual = native.layer_norm(x, weight, bias, 1e-5, residual)
        close(actual, reference.layer_norm(x, weight, bias, 1e-5, twin))
        assert torch.equal(residual, twin)


def test_norm_reads_rows_that_lie_apart(native, dtype, generator) -> None:
    x = torch.randn((4, 96), generator=generator).to(dtype)[:, 32:64]
    weight = torch.ones(32, dtype=dtype)
    close(native.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(native, dtype, generator, activation) -> None:
    for rows, cols in [(0, 8), (1, 1), (1, 2048), (3, 20), (9, 1000)]:
        x = (torch.randn((rows, 2 * cols), generator=generator) * 4).to(dtype)
        close(native.act_mul(x, activation), reference.act_mul(x, activation))
        half = x[:, :cols]
        close(native.act(half, activation), reference.act(half, activation))


def test_activations_at_the_ends_of_the_range(native, dtype) -> None:
    x = torch.tensor([[-1e30, -100.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 100.0, 1e15]]).to(dtype)
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        close(native.act(x, activation), reference.act(x, activation))


def test_nan_stays_nan(native: ModuleType, dtype: torch.dtype) -> None:
    x = torch.full((1, 40), float("nan"), dtype=dtype)
    assert native.rms_norm(x, torch.ones(40, dtype=dtype), 1e-6).isnan().all()
    assert native.act(x, "silu").isnan().all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rms_norm", (torch.zeros(2, 4, dtype=torch.float16), torch.zeros(4), 1e-6)),
        ("rms_norm", (torch.zeros(2, 4), torch.zeros(5), 1e-6)),
        ("rms_norm", (torch.zeros(2, 4), torch.zeros(4, dtype=torch.bfloat16), 1e-6)),
        ("rms_norm", (torch.zeros(2, 4), torch.zeros(4), 1e-6, torch.zeros(2, 8)[:, :4])),
        ("rms_norm", (torch.zeros(4, 2).T, torch.zeros(4), 1e-6)),
        ("rms_norm", (torch.zeros(4), torch.zeros(4), 1e-6)),
        ("act_mul", (torch.zeros(2, 5), "silu")),
    ],
)
def test_wrong_arguments_are_refused(native, name, arguments) -> None:
    with pytest.raises(ValueError, match=r"must|rows|even"):
        getattr(native, name)(*arguments)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 20), (9, 1000), (20, 2048)], ids=str)
def test_quantize_rows(native, dtype, generator, shape) -> None:
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    if shape[0] > 1:
        x[1] = 0
    q, scale = native.quantize_rows(x)
    expected_q, expected_scale = reference.quantize_rows(x)
    torch.testing.assert_close(scale, expected_scale)
    # a value half way between two integers may go either way
    assert ((q.int() - expected_q.int()).abs() <= 1).all()
    assert ((x.float() - q * scale[:, None]).abs() <= 0.5001 * scale[:, None]).all()
    assert (q[scale > 0].abs().amax(1) == 127).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_scale_rows(native, dtype, generator, with_bias) -> None:
    x = torch.randn((33, 600), generator=generator).to(dtype)
    scale = torch.rand(33, generator=generator)
    bias = torch.randn(600, generator=generator).to(dtype) if with_bias else None
    expected = reference.scale_rows_(x.clone(), scale, bias)
    assert native.scale_rows_(x, scale, bias) is x
    close(x, expected)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (2, 16), (5, 32003)], ids=str)
def test_argmax(native, dtype, generator, shape) -> None:
    x = torch.randn(shape, generator=generator).to(dtype)  # bfloat16 has many equals
    assert torch.equal(native.argmax(x), reference.argmax(x))


def test_argmax_of_odd_rows(native, dtype) -> None:
    x = torch.zeros((5, 40), dtype=dtype)
    x[0] = float("-inf")
    x[1, 39] = 1e-30
    x[2, 38] = float("inf")
    x[3, 21] = x[3, 30] = float("nan")
    x[4, 5:8] = 3.0
    assert native.argmax(x).tolist() == [0, 39, 38, 21, 5]
    with pytest.raises(ValueError, match="columns"):
        native.argmax(x[:, :0])


def test_threads_do_not_change_results(native, dtype, generator, threads) -> None:
    x = torch.randn((50, 2 * 1024), generator=generator).to(dtype)
    weight = torch.randn(2048, generator=generator).to(dtype)

    def results() -> list[torch.Tensor]:
        residual = x.clone()
        normed = native.rms_norm(x, weight, 1e-6, residual)
        rows = native.quantize_rows(x)
        return [normed, residual, native.act_mul(x, "silu"), *rows, native.argmax(x)]

    alone = results()
    threads(3)
    for one, three in zip(alone, results(), strict=True):
        assert torch.equal(one, three)
