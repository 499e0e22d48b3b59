from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tgis.errors import ModelError
from tgis.quant import linear
from tgis.quant.linear import LinearSource, Piece, can_pack, load_linear, make_linear, packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Stored(dict[str, Tensor]):
    """Tensors in memory, in the shape of a checkpoint."""

    @contextmanager
    def tensor(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        if name not in self or self[name].shape != shape:
            raise ModelError(name)
        yield self[name]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def packable(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU or torch does not pack {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (24, 40), (67, 131), (768, 96)])
def test_packed_layers_equal_plain_ones_at_every_number_of_rows(
    dtype: torch.dtype, bias: bool, in_features: int, out_features: int
) -> None:
    packable(dtype)
    weight = random(out_features, in_features, dtype=dtype)
    b = random(out_features, dtype=dtype) if bias else None
    layer = packed(weight, b)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for rows in (1, 2, 7, 8, 32, 128):
        x = random(rows, in_features, dtype=dtype)
        exact = functional.linear(x.double(), weight.double(), None if b is None else b.double())
        scale = functional.linear(x.double().abs(), weight.double().abs()).max() + 1
        assert layer(x).shape == exact.shape
        assert (layer(x).double() - exact).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_does_not_need_the_weight_it_was_made_from(dtype: torch.dtype) -> None:
    packable(dtype)
    weight, x = random(8, 16, dtype=dtype), random(3, 16, dtype=dtype)
    layer = packed(weight)
    before = layer(x)
    weight.zero_()
    assert torch.equal(layer(x), before)


def test_rows_may_lie_apart() -> None:
    weight, x = random(8, 16), random(5, 48)[:, 16:32]
    torch.testing.assert_close(make_linear(weight)(x), functional.linear(x, weight))


@pytest.mark.parametrize("broken", ["raises", "computes wrongly"])
def test_without_the_operator_layers_are_plain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fails(*_: object) -> linear.Linear:
        if broken == "raises":
            raise RuntimeError("could not create a primitive\nand more")
        return lambda x: torch.zeros(len(x), 24)

    monkeypatch.setattr(linear, "packed", fails)
    can_pack.cache_clear()
    try:
        weight, x = random(8, 16), random(3, 16)
        assert torch.equal(make_linear(weight)(x), functional.linear(x, weight))
        assert torch.equal(make_linear(weight)(x), functional.linear(x, weight))
    finally:
        can_pack.cache_clear()
    assert len(caplog.messages) == 1
    assert "weights of torch.float32 are not packed" in caplog.text


@st.composite
def sources(draw: st.DrawFn) -> LinearSource:
    """Layers of one to three pieces, each of some rows of a stored matrix, all of some columns."""
    width = draw(st.integers(1, 12))
    first = draw(st.integers(0, width - 1))
    columns = (first, draw(st.integers(first + 1, width)))
    pieces = []
    for n in range(draw(st.integers(1, 3))):
        height = draw(st.integers(1, 12))
        spans = st.integers(0, height - 1).flatmap(
            lambda start, height=height: st.tuples(st.just(start), st.integers(start + 1, height))
        )
        rows = tuple(draw(st.lists(spans, min_size=1, max_size=3)))
        pieces.append(Piece(f"p{n}", (height, width), rows, columns, draw(st.booleans())))
    return LinearSource(tuple(pieces), has_bias=draw(st.booleans()), adds_bias=draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(source=sources())
def test_pieces_are_put_together_as_described(source: LinearSource) -> None:
    stored, weights, biases = Stored(), [], []
    for piece in source.pieces:
        weight, bias = random(*piece.shape), random(piece.shape[0])
        stored[f"{piece.name}.weight"] = weight.T.contiguous() if piece.transposed else weight
        if source.has_bias:
            stored[f"{piece.name}.bias"] = bias
        index = [row for start, stop in piece.rows for row in range(start, stop)]
        weights.append(weight[index][:, slice(*piece.columns)])
        biases.append(bias[index])
    expected = torch.cat(weights)
    bias = torch.cat(biases) if source.has_bias and source.adds_bias else None
    assert (source.out_features, source.in_features) == expected.shape
    x = random(4, source.in_features)
    computed = load_linear(stored, source, torch.float32)(x)
    torch.testing.assert_close(computed, functional.linear(x, expected, bias), rtol=0, atol=1e-5)


def test_what_is_stored_in_another_type_is_converted() -> None:
    weight = random(8, 16, dtype=torch.float16)
    source = LinearSource((Piece("p", (8, 16), ((0, 8),), (0, 16)),), has_bias=False)
    layer = load_linear(Stored({"p.weight": weight}), source, torch.float32)
    x = random(3, 16)
    torch.testing.assert_close(layer(x), functional.linear(x, weight.float()))


def test_a_missing_weight_is_named() -> None:
    source = LinearSource((Piece("p", (8, 16), ((0, 8),), (0, 16)),), has_bias=False)
    with pytest.raises(ModelError, match=r"weight p\.weight does not exist"):
        load_linear(Stored(), source, torch.float32)
