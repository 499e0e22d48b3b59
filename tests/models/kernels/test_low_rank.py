"""Low-rank additions against their PyTorch twin."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from tgis.models.kernels import low_rank, low_rank_reference
from tgis.models.kernels.low_rank_reference import Pair, Site


@pytest.fixture(autouse=True)
def kernel(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_low_rank", native._kernel("tgis_low_rank", low_rank.FIELDS))


class Case:
    """Adapters, and rows that have them; the last layer is not adapted by any."""

    def __init__(
        self,
        generator: torch.Generator,
        dtype: torch.dtype,
        ranks: list[tuple[int, ...]],  # per adapter, of each part; 0: not adapted
        widths: tuple[int, ...],
        num_inputs: int,
        rows: list[int],  # the number of each row's adapter; -1: none
    ) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        def site(parts: tuple[int, ...]) -> Site:
            pairs = (
                Pair(random(r, num_inputs) * num_inputs**-0.5, random(n, r)) if r else None
                for r, n in zip(parts, widths, strict=True)
            )
            return Site(tuple(pairs), dtype)

        sites = [[None, site(parts), None] for parts in ranks]
        self.ours = [low_rank.Adapter(s) for s in sites]
        self.twins = [low_rank_reference.Adapter(s) for s in sites]
        self.rows, self.widths = rows, widths
        self.x = random(len(rows), num_inputs).to(dtype)
        self.y = random(len(rows), sum(widths)).to(dtype)

    def check(self, site: int = 1, index: torch.Tensor | None = None) -> torch.Tensor:
        ours, twins = (
            torch.tensor([0 if row < 0 else adapters[row].address for row in self.rows])
            for adapters in (self.ours, self.twins)
        )
        x, y = self.x, self.y
        if index is not None:
            ours, twins, x, y = ours[index], twins[index], x[index], y[index]
        actual = low_rank.add_(y.clone(), x, ours, site, self.widths)
        expected = low_rank_reference.add_(y.clone(), x, twins, site, self.widths)
        exact = x.dtype == torch.float32
        # Ranks are rounded to x's type between the two products.
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if exact else {"rtol": 2**-6, "atol": 2**-4}
        torch.testing.assert_close(actual, expected, **tolerance)
        return actual


MIXED = [0, 1, -1, 2, 0, 2, -1, 2]


@pytest.mark.parametrize("num_inputs", [1, 48, 61])
@pytest.mark.parametrize("widths", [(16,), (48, 16, 16), (7, 3, 1), (600,)], ids=str)
def test_mixed_adapters(
    native: ModuleType,
    dtype: torch.dtype,
    generator: torch.Generator,
    widths: tuple[int, ...],
    num_inputs: int,
) -> None:
    parts = len(widths)
    ranks = [(4,) * parts, (16, 0, 1)[:parts], (3, 40, 7)[:parts]]
    Case(generator, dtype, ranks, widths, num_inputs, MIXED).check()


@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 5, 9, 33])
def test_numbers_of_rows(
    native: ModuleType, dtype: torch.dtype, generator: torch.Generator, num_rows: int
) -> None:
    rows = [0] * num_rows + [-1]
    Case(generator, dtype, [(8, 8)], (20, 300), 32, rows).check()


@pytest.mark.parametrize("threads_used", [1, 2, 3])
def test_threads(
    native: ModuleType,
    dtype: torch.dtype,
    generator: torch.Generator,
    threads: Callable[[int], None],
    threads_used: int,
) -> None:
    case = Case(generator, dtype, [(6, 2), (8, 8)], (700, 300), 64, [0, 1] * 20)
    alone = case.check()
    threads(threads_used)
    assert torch.equal(case.check(), alone)


def test_a_row_does_not_depend_on_its_neighbours(
    native: ModuleType, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = Case(generator, dtype, [(6, 2), (8, 8)], (70, 30), 64, [0, 1, 1, -1, 0, 1, 1, 1])
    together = case.check()
    for row in range(len(case.rows)):
        alone = case.check(index=torch.tensor([row]))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=0)


def test_float32_output(native: ModuleType, dtype: torch.dtype, generator: torch.Generator) -> None:
    case = Case(generator, dtype, [(4,), (6,)], (50,), 24, [0, 1, -1, 1, 1])
    case.y = case.y.float()
    assert case.check().dtype == torch.float32


def test_a_large_adapter(
    native: ModuleType, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Its memory is not torch's."""
    case = Case(generator, dtype, [(40,)], (30_000,), 3001, [0, -1, 0])
    assert case.ours[0].num_bytes > 2 << 20
    case.check()


def test_a_layer_that_is_not_adapted(
    native: ModuleType, dtype: torch.dtype, generator: torch.Generator
) -> None:
    case = Case(generator, dtype, [(4,), (0,)], (16,), 8, [0, 1, -1])
    for site in (0, 2):
        assert torch.equal(case.check(site=site), case.y)
    assert torch.equal(case.check()[1:], case.y[1:])
    assert not torch.equal(case.check()[0], case.y[0])


def test_wrong_arguments(native: ModuleType, generator: torch.Generator) -> None:
    case = Case(generator, torch.float32, [(4,)], (16,), 8, [0])
    rows = torch.tensor([case.ours[0].address])
    for y, x in (
        (case.y[:, :8], case.x),
        (case.y, case.x.double()),
        (case.y.bfloat16(), case.x),
        (case.y, case.x.repeat(2, 1)),
    ):
        with pytest.raises(ValueError, match="must be"):
            low_rank.add_(y, x, rows, 1, (16,))
