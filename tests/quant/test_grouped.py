import pytest
import torch
from torch.nn import functional

from tgis.quant.grouped import dequantise, dequantising, quantise


def weight(out: int, features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out * features)
    return torch.randn(out, features, generator=generator) * 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "features", "size"), [(40, 96, 32), (3, 70, 32), (17, 64, -1)])
def test_no_value_is_farther_from_its_weight_than_half_a_step(bits, out, features, size) -> None:
    w = weight(out, features)
    quantised = quantise(w, bits, size)
    assert quantised.q.dtype == torch.uint8
    assert int(quantised.q.max()) < 2**bits
    scale = quantised.scale[:, quantised.group].abs()
    inside = (quantised.q > 0) & (quantised.q < 2**bits - 1)  # others may have been cut off
    error = (dequantise(quantised) - w).abs()
    assert (error[inside] <= scale[inside] * 0.5001).all()
    assert error.norm() / w.norm() < {4: 0.1, 8: 0.01}[bits]


def test_quantising_what_is_quantised_changes_nothing() -> None:
    once = dequantise(quantise(weight(24, 128), 8, -1))
    torch.testing.assert_close(dequantise(quantise(once, 8, -1)), once, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    w = weight(8, 64)
    w[2] = 0
    w[:, :32] = 0
    assert (dequantise(quantise(w, bits, 32))[w == 0] == 0).all()


def test_rows_of_a_large_weight_do_not_depend_on_each_other() -> None:
    w = weight(3000, 256)  # several blocks
    whole = dequantise(quantise(w, 4, 32))
    assert torch.equal(whole[1000:1100], dequantise(quantise(w[1000:1100], 4, 32)))


def test_the_dequantising_layer_in_all_dtypes() -> None:
    quantised = quantise(weight(40, 96), 4, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, bias = torch.ones(3, 96, dtype=dtype), torch.arange(40).to(dtype)
        expected = functional.linear(x, dequantise(quantised).to(dtype), bias)
        torch.testing.assert_close(dequantising(quantised, bias, dtype)(x), expected)
