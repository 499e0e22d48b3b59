"""GPTQ's and AWQ's tensors, packed here value by value as the formats' descriptions say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.quant.test_linear import Stored
from torch import Tensor
from torch.nn import functional

from tgis.errors import ModelError
from tgis.models.kernels.grouped import grouped_linear
from tgis.quant.grouped import dequantising
from tgis.quant.linear import Linear, LinearSource, Piece
from tgis.quant.scheme import Scheme
from tgis.quant.stored import load_stored, stored_config

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(values: list[list[int]], bits: int, order: list[int] | None = None) -> Tensor:
    """Rows of values -> int32, value order[j] of each word at bit j * bits."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    rows = []
    for row in values:
        packed = []
        for at in range(0, len(row), per_word):
            word = sum(row[at + order[j]] << (bits * j) for j in range(per_word))
            packed.append(word - 2**32 if word >= 2**31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


class Weight:
    """A random weight: its stored tensors, and what it stands for in float64 [out, in]."""

    def __init__(
        self,
        scheme: Scheme,
        out: int,
        features: int,
        seed: int,
        act_order: bool = False,
        g_idx: list[int] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = features if scheme.group_size < 0 else scheme.group_size
        groups = -(-features // size)
        group = torch.arange(features) // size
        if act_order:
            group = group[torch.randperm(features, generator=generator)]
        if g_idx is not None:
            group = torch.tensor(g_idx)
        self.g_idx = group.tolist()
        top = 2**scheme.bits
        q = torch.randint(0, top, (features, out), generator=generator)
        stored_zero = torch.randint(0, top, (groups, out), generator=generator)
        scale = (torch.rand(groups, out, generator=generator) * 0.01 + 0.01).half()
        zero = stored_zero + scheme.zero_offset
        self.matrix = (scale.double()[group] * (q - zero[group]).double()).T
        self.bias = torch.randn(out, generator=generator)
        order = AWQ_ORDER if scheme.method == "awq" else None
        weight = q.tolist() if scheme.method == "awq" else q.T.tolist()
        packed = words(weight, scheme.bits, order)
        self.tensors = {
            "qweight": packed if scheme.method == "awq" else packed.T.contiguous(),
            "qzeros": words(stored_zero.tolist(), scheme.bits, order),
            "scales": scale,
        }
        if scheme.method == "gptq":
            self.tensors["g_idx"] = group.to(torch.int32)

    def store(self, stored: Stored, name: str, bias: bool = False) -> None:
        stored.update({f"{name}.{part}": tensor for part, tensor in self.tensors.items()})
        if bias:
            stored[f"{name}.bias"] = self.bias.half()


def load(
    scheme: Scheme, stored: Stored, source: LinearSource, dtype: torch.dtype, make: Any
) -> Linear:
    def unused(*_: object) -> Linear:
        raise AssertionError

    return load_stored(scheme, make, stored, source, dtype, unused)


SCHEMES = {
    "gptq": Scheme("gptq", 4, 32, 1),
    "gptq, 8 bits": Scheme("gptq", 8, 64, 1),
    "gptq, one group": Scheme("gptq", 4, -1, 1),
    "gptq, odd groups": Scheme("gptq", 4, 24, 1),
    "gptq, version 2": Scheme("gptq", 8, 32, 0),
    "awq": Scheme("awq", 4, 64),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("make", [grouped_linear, dequantising], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_alone_fused_and_in_parts(
    scheme: Scheme, act_order: bool, make: Any, dtype: torch.dtype
) -> None:
    if act_order and scheme.method == "awq":
        pytest.skip("AWQ has no order of its own")
    features = 192
    first = Weight(scheme, 64, features, 0, act_order)
    second = Weight(scheme, 32, features, 1, g_idx=first.g_idx)
    stored = Stored()
    first.store(stored, "a", bias=True)
    second.store(stored, "b", bias=True)
    one = Piece("a", (64, features), ((0, 64),), (0, features))
    two = Piece("b", (32, features), ((0, 32),), (0, features))
    some = replace(one, rows=((8, 16), (40, 61)))
    x = torch.randn(5, features, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias_a, bias_b = first.bias.half().double(), second.bias.half().double()
    cases = {
        "alone": (LinearSource((one,), False), first.matrix, bias_a),
        "fused": (
            LinearSource((one, two), True),
            torch.cat([first.matrix, second.matrix]),
            torch.cat([bias_a, bias_b]),
        ),
        "some outputs": (
            LinearSource((some, two), True),
            torch.cat([first.matrix[8:16], first.matrix[40:61], second.matrix]),
            torch.cat([bias_a[8:16], bias_a[40:61], bias_b]),
        ),
    }
    for columns in ((0, 96), (96, 192), (36, 133)):  # of ranks, and of no rank
        part = replace(one, columns=columns)
        cases[f"columns {columns}"] = (
            LinearSource((part,), True, adds_bias=columns[0] == 0),
            first.matrix[:, slice(*columns)],
            bias_a if columns[0] == 0 else torch.zeros(64).double(),
        )
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for name, (source, matrix, bias) in cases.items():
        layer = load(scheme, stored, source, dtype, make)
        part_of_x = x[:, slice(*source.pieces[0].columns)].contiguous()
        exact = functional.linear(part_of_x.double(), matrix, bias)
        size = functional.linear(part_of_x.double().abs(), matrix.abs(), bias.abs())
        error = (layer(part_of_x).double() - exact).abs() / (size + 1e-9)
        assert error.max() < tolerance, name


def test_a_zero_point_of_16_is_meant() -> None:
    scheme = Scheme("gptq", 4, 32, 1)
    weight = Weight(scheme, 32, 64, 0)
    weight.tensors["qzeros"] = torch.full_like(weight.tensors["qzeros"], -1)  # 15 everywhere
    stored = Stored()
    weight.store(stored, "a")
    source = LinearSource((Piece("a", (32, 64), ((0, 32),), (0, 64)),), False)
    zeros: list[Tensor] = []
    load(scheme, stored, source, torch.float32, lambda w, *_: zeros.append(w.zero))
    assert (zeros[0] == 16).all()


def test_groups_of_fused_parts_must_be_equal() -> None:
    scheme = Scheme("gptq", 4, 32, 1)
    stored = Stored()
    for n, name in enumerate("ab"):
        Weight(scheme, 32, 64, n, act_order=True).store(stored, name)
    pieces = tuple(Piece(name, (32, 64), ((0, 32),), (0, 64)) for name in "ab")
    with pytest.raises(ModelError, match="weights a and b are computed together, but their g_idx"):
        load(scheme, stored, LinearSource(pieces, False), torch.float32, grouped_linear)


def test_groups_that_are_not_there() -> None:
    scheme = Scheme("gptq", 4, 32, 1)
    weight = Weight(scheme, 32, 64, 0)
    weight.tensors["g_idx"][3] = 2
    stored = Stored()
    weight.store(stored, "a")
    source = LinearSource((Piece("a", (32, 64), ((0, 32),), (0, 64)),), False)
    with pytest.raises(ModelError, match=r"weight a.g_idx has values from 0 to 2, .* 2 groups"):
        load(scheme, stored, source, torch.float32, grouped_linear)


def test_what_tgi_stores_instead_of_a_configuration() -> None:
    assert stored_config(Stored()) is None
    stored = Stored(gptq_bits=torch.tensor([4]), gptq_groupsize=torch.tensor([128]))
    assert stored_config(stored) == {"quant_method": "gptq", "bits": 4, "group_size": 128}
