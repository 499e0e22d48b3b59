"""Rows in whole tiles, against plain products."""

import pytest
import torch
from torch.nn import functional

from tgis.quant import tiles
from tgis.quant.linear import packed

NAN = float("nan")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def product(weight):
    """A product that notes how many rows it was called with, and where they lie."""
    calls = []

    def multiply(x):
        calls.append((len(x), x.data_ptr()))
        return x @ weight.T

    return multiply, calls


def test_rows_come_in_few_numbers() -> None:
    found = [tiles.whole(rows) for rows in range(513)]
    assert set(found) == {*range(17), *range(20, 129, 4), *range(144, 513, 16)}
    assert all(rows <= size for rows, size in enumerate(found))


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 20, 127, 128, 129, 143, 144, 145, 300])
def test_the_product_is_that_of_the_rows(rows, generator) -> None:
    weight = torch.randn((5, 7), generator=generator)
    multiply, calls = product(weight)
    x = torch.randn((rows, 7), generator=generator)
    y = tiles.multiplied(multiply, x)
    torch.testing.assert_close(y, x @ weight.T)
    assert y.is_contiguous()
    assert [count for count, _ in calls] == [tiles.whole(rows)]


def test_memory_behind_the_rows_saves_a_copy(generator) -> None:
    multiply, calls = product(torch.randn((5, 7), generator=generator))
    x = tiles.empty(130, 7, torch.float32)
    assert x.shape == (130, 7)
    assert x.is_contiguous()
    x.untyped_storage().copy_(torch.full((144, 7), NAN).untyped_storage())
    x.copy_(torch.randn((130, 7), generator=generator))
    y = tiles.multiplied(multiply, x)
    assert calls == [(144, x.data_ptr())]
    assert y.isfinite().all()


def test_no_memory_behind_the_end_is_read(generator) -> None:
    """The last rows of a larger tensor have too little behind them, or something else."""
    multiply, calls = product(torch.randn((5, 7), generator=generator))
    large = torch.randn((150, 7), generator=generator)
    for x in (large[7:], large[6:136], large.T.contiguous().T[:130]):
        calls.clear()
        torch.testing.assert_close(tiles.multiplied(multiply, x), multiply(x))
        in_place = calls[0][1] == x.data_ptr()
        assert in_place == (x.storage_offset() == 6 * 7)


def test_a_layer_in_bfloat16_gives_its_rows_alone(generator) -> None:
    weight = torch.randn((24, 32), generator=generator).bfloat16()
    x = torch.randn((133, 32), generator=generator).bfloat16()
    y = packed(weight)(x)
    assert y.shape == (133, 24)
    expected = functional.linear(x.float(), weight.float())
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=0.1)
