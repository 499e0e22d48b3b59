from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tests.quant.test_linear import Stored
from torch import Tensor

from tgis.errors import ModelError
from tgis.quant.gptq import Moments, Options, gptq_tensors, quantise_gptq
from tgis.quant.grouped import Grouped, dequantise
from tgis.quant.linear import LinearSource, Piece
from tgis.quant.scheme import Scheme
from tgis.quant.stored import load_stored

FEATURES, OUT = 256, 48
OPTIONS = {
    "usual": Options(),
    "zero points": Options(sym=False),
    "order of activation": Options(desc_act=True),
    "small groups": Options(group_size=32),
    "groups across blocks": Options(group_size=96, desc_act=True),
    "one group": Options(group_size=-1),
    "8 bits": Options(bits=8),
}


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Features that go together, as those of a network do; some are never there."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator) * torch.rand(
        FEATURES, generator=generator
    )
    x = torch.randn(1000, FEATURES, generator=generator) @ mixing
    x[:, [3, 200]] = 0
    return x


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(OUT, FEATURES, generator=torch.Generator().manual_seed(1)) * 0.05


def rounded(weight: Tensor, options: Options) -> Tensor:
    """The nearest values on a grid of the same kind, group by group."""
    w, top, size = weight.clone(), 2**options.bits - 1, options.size(FEATURES)
    for at in range(0, FEATURES, size):
        part = w[:, at : at + size]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        if options.sym:
            high = torch.maximum(high, -low)
            low = -high
        step = (high - low) / top
        part.copy_(((part - low) / step).round() * step + low)
    return w


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_are_nearer_than_with_the_nearest_values(
    options: Options, inputs: Tensor, weight: Tensor
) -> None:
    moments = Moments(FEATURES)
    for part in inputs.split(300):
        moments.add(part[None])
    assert moments.count == 1000
    quantised = quantise_gptq(weight, moments.hessian, options, "x")

    def error(w: Tensor) -> float:
        return float((inputs @ (w - weight).T).norm() / (inputs @ weight.T).norm())

    assert error(dequantise(quantised)) < 0.8 * error(rounded(weight, options))
    assert torch.equal(quantised.scale.half().float(), quantised.scale)
    counts = torch.bincount(quantised.group)
    assert counts.max() == min(options.size(FEATURES), FEATURES)
    if not options.desc_act:
        assert torch.equal(quantised.group, quantised.group.sort().values)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_stored_is_read_again(bits: int, sym: bool, inputs: Tensor, weight: Tensor) -> None:
    moments = Moments(FEATURES)
    moments.add(inputs)
    options = Options(bits=bits, group_size=64, desc_act=True, sym=sym)
    quantised = quantise_gptq(weight, moments.hessian, options, "x")
    source = LinearSource((Piece("x", (OUT, FEATURES), ((0, OUT),), (0, FEATURES)),), False)
    read: list[Grouped] = []
    load_stored(
        Scheme("gptq", bits, 64, int(sym)),
        lambda w, *_: read.append(w),  # type: ignore[arg-type, return-value]
        Stored(gptq_tensors("x", quantised, options.checkpoint_format)),
        source,
        torch.float32,
        lambda *_: None,  # type: ignore[arg-type, return-value]
    )
    assert torch.equal(dequantise(read[0]), dequantise(quantised))


def test_groups_without_negative_values(inputs: Tensor) -> None:
    moments = Moments(FEATURES)
    moments.add(inputs)
    weight = torch.rand(OUT, FEATURES, generator=torch.Generator().manual_seed(2)) + 0.1
    quantised = quantise_gptq(weight, moments.hessian, Options(sym=False), "x")
    assert int(quantised.zero.min()) == 0
    error = (inputs @ (dequantise(quantised) - weight).T).norm() / (inputs @ weight.T).norm()
    assert error < 0.05


def broken(kind: str) -> tuple[Tensor, Tensor]:
    weight, hessian = torch.ones(8, 16), torch.eye(16)
    if kind == "weight":
        weight[0, 0] = float("nan")
    elif kind == "hessian":
        hessian[0, 0] = float("inf")
    else:
        hessian.fill_(-1.0)
        hessian.diagonal().fill_(1e-6)
    return weight, hessian


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weight", "x: its weights, or its inputs with this text, are not finite"),
        ("hessian", "x: its weights, or its inputs with this text, are not finite"),
        ("inverse", "x: the Hessian of its inputs cannot be inverted; use more text"),
    ],
)
def test_what_cannot_be_quantised(kind: str, message: str) -> None:
    weight, hessian = broken(kind)
    with pytest.raises(ModelError, match=message):
        quantise_gptq(weight, hessian, Options(), "x")


@pytest.mark.parametrize(("out", "features", "fits"), [(16, 32, True), (12, 32, False)])
def test_sizes_must_fill_words(out: int, features: int, fits: bool) -> None:
    quantised = quantise_gptq(torch.ones(out, features), torch.eye(features), Options(), "x")
    refusal: AbstractContextManager[object] = nullcontext()
    if not fits:
        refusal = pytest.raises(ModelError, match="must be multiples of 8")
    with refusal:
        gptq_tensors("x", quantised, "gptq")
