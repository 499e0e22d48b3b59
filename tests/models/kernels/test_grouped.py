"""Layers on weights of 4 and 8 bits against the weights that they stand for."""

from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgis.models import kernels
from tgis.models.kernels import grouped_native
from tgis.models.kernels.grouped import grouped_linear
from tgis.models.kernels.grouped_pack import pack
from tgis.quant.grouped import MIDDLE, Grouped, dequantise

ROWS = (1, 17, 32, 33, 70)
FEW = 32  # of these, bfloat16 loses nothing


@pytest.fixture(autouse=True)
def kernel(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    function = native._kernel("tgis_linear_grouped", grouped_native.FIELDS)
    monkeypatch.setattr(grouped_native, "_linear_grouped", function)
    monkeypatch.setattr(kernels, "grouped_product", grouped_native.grouped_product)


def random_weight(
    bits: int, out: int, group: Tensor, generator: torch.Generator, symmetric: bool
) -> Grouped:
    shape = (out, int(group.max()) + 1)
    zero = torch.full(shape, MIDDLE[bits])
    if not symmetric:
        zero = torch.randint(0, 2**bits + 1, shape, generator=generator)
    return Grouped(
        bits=bits,
        q=torch.randint(0, 2**bits, (out, len(group)), generator=generator, dtype=torch.uint8),
        scale=(torch.rand(shape, generator=generator) * 0.01 + 0.01).half().float(),
        zero=zero.to(torch.int16),
        group=group,
    )


def check(
    weight: Grouped, dtype: torch.dtype, generator: torch.Generator, rows: tuple[int, ...] = ROWS
) -> None:
    """The layer against its weight: errors as parts of what the sums are made of."""
    out, features = weight.q.shape
    bias = torch.randn(out, generator=generator).to(dtype)
    layer = grouped_linear(weight, bias, dtype, torch.float32)
    w = dequantise(weight).double()
    for n in rows:
        x = torch.randn(n, features, generator=generator).to(dtype)
        y = layer(x)
        assert y.dtype == torch.float32
        magnitude = x.double().abs() @ w.abs().T + bias.double().abs() + 1e-9
        error = (y.double() - (x.double() @ w.T + bias.double())).abs() / magnitude
        exact = dtype == torch.float32 or n <= FEW
        assert error.max() < (1e-5 if exact else 2**-7)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 128, -1, 16, 20])
def test_layers_equal_their_weights(dtype, generator, bits, symmetric, size) -> None:
    for out, features in ((33, 100), (40, 544)):
        group = torch.arange(features) // (features if size < 0 else size)
        check(random_weight(bits, out, group, generator, symmetric), dtype, generator)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_input_features_may_belong_to_any_group(dtype, data: st.DataObject) -> None:
    features, groups = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    group = torch.randint(0, groups, (features,), generator=generator)
    weight = random_weight(
        data.draw(st.sampled_from([4, 8])),
        data.draw(st.integers(1, 70)),
        group,
        generator,
        data.draw(st.booleans()),
    )
    check(weight, dtype, generator, (1, 35))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 512])
def test_a_row_does_not_depend_on_its_neighbours(dtype, generator, bits, size, threads) -> None:
    weight = random_weight(bits, 100, torch.arange(512) // size, generator, symmetric=False)
    layer = grouped_linear(weight, None, dtype, torch.float32)  # rounding would hide differences
    x = torch.randn(FEW, 512, generator=generator).to(dtype)
    together = layer(x)
    for row in (0, 15, 16, 31):
        assert torch.equal(together[row : row + 1], layer(x[row : row + 1]))
    threads(3)
    assert torch.equal(layer(x), together)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e6])
def test_scales_beyond_float16(dtype, generator, scale) -> None:
    weight = random_weight(4, 40, torch.arange(64) // 32, generator, symmetric=True)
    weight.scale.mul_(scale)
    x = torch.randn(3, 64, generator=generator).to(dtype)
    y = grouped_linear(weight, None, dtype, torch.float32)(x)
    expected = x.double() @ dequantise(weight).double().T
    assert ((y.double() - expected).abs().max() / expected.abs().max()) < 1e-3


def test_wrong_rows_are_refused(generator) -> None:
    weight = random_weight(4, 40, torch.arange(64) // 32, generator, symmetric=True)
    layer = grouped_linear(weight, None, torch.bfloat16)
    for x in (torch.zeros(2, 32).bfloat16(), torch.zeros(2, 64), torch.zeros(64, 2).bfloat16().T):
        with pytest.raises(ValueError, match="x must be contiguous"):
            layer(x)


def test_memory_of_four_bits_is_four_bits(generator) -> None:
    weight = random_weight(4, 64, torch.arange(1024) // 32, generator, symmetric=True)
    packed = pack(weight)
    assert packed.q.nbytes == 64 * 1024 // 2
    assert packed.scale.nbytes == 64 * 32 * 2
    assert packed.shift is None
    assert packed.order is None


def test_without_the_kernel_layers_are_those_of_pytorch(generator, monkeypatch) -> None:
    from tgis.models.kernels import reference

    monkeypatch.setattr(kernels, "grouped_product", reference.grouped_product)
    weight = random_weight(4, 40, torch.arange(96) // 32, generator, symmetric=False)
    check(weight, torch.float32, generator)
    half = grouped_linear(weight, None, torch.float16)(torch.ones(2, 96).half())
    assert half.dtype == torch.float16
