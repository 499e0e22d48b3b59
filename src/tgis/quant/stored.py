"""Layers of weights that a checkpoint stores quantised: GPTQ's and AWQ's tensors.

For a weight [out, in] of b bits, with n = 32 / b values in each int32:

    GPTQ (arXiv:2210.17323)   qweight [in / n, out]: value j of a word is input feature j of n
                              qzeros [groups, out / n], in order
                              g_idx [in]: the group of each input feature
    AWQ (arXiv:2306.00978)    qweight [in, out / n], qzeros [groups, out / n]: outputs of a word in
    in its "gemm" layout      the order 0 2 4 6 1 3 5 7; groups of neighbouring input features
    both                      scales [groups, out]

The first version of GPTQ's format stores zero points minus one; a stored 15 means 16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgis.errors import ModelError
from tgis.quant.grouped import Grouped, MakeGrouped, stack
from tgis.quant.linear import Linear, LinearSource, MakeLinear, Piece, Span, Tensors, copy_bias
from tgis.quant.scheme import SUFFIX, Scheme

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def load_stored(
    scheme: Scheme,
    make: MakeGrouped,
    tensors: Tensors,
    source: LinearSource,
    dtype: torch.dtype,
    _: MakeLinear,
) -> Linear:
    """A layer; with the first two arguments bound, an entry of `linear.Formats`.

    Raises:
        ModelError: a tensor is missing or wrong, or pieces have different groups.
    """
    read = READERS[scheme.method]
    pieces = [read(scheme, tensors, piece) for piece in source.pieces]
    for piece, weight in zip(source.pieces, pieces, strict=True):
        if not torch.equal(weight.group, pieces[0].group):
            raise ModelError(
                f"weights {source.pieces[0].name} and {piece.name} are computed together, but"
                " their g_idx differ"
            )
    return make(stack(pieces), _bias(tensors, source, dtype), dtype)


def stored_config(tensors: Tensors) -> dict[str, Any] | None:
    """What TGI's own quantiser stores beside GPTQ's weights instead of a configuration."""
    if "gptq_bits" not in tensors:
        return None
    values = {}
    for key, name in (("bits", "gptq_bits"), ("group_size", "gptq_groupsize")):
        with tensors.tensor(name, (1,)) as stored:
            values[key] = int(stored)
    return {"quant_method": "gptq", **values}


def _bias(tensors: Tensors, source: LinearSource, dtype: torch.dtype) -> Tensor | None:
    """Quantisers may add a bias to layers that had none."""
    stored = [f"{piece.name}.bias" in tensors for piece in source.pieces]
    if not source.has_bias and not any(stored):
        return None
    bias = torch.zeros(source.out_features, dtype=dtype)
    row = 0
    for piece, is_stored in zip(source.pieces, stored, strict=True):
        if is_stored or source.has_bias:
            copy_bias(tensors, piece, bias[row : row + piece.out_features])
        row += piece.out_features
    return bias if source.adds_bias else None


def _gptq(scheme: Scheme, tensors: Tensors, piece: Piece) -> Grouped:
    out, features = piece.shape
    words = -(-features // scheme.per_word)
    first, last = piece.columns
    start, stop = first // scheme.per_word, -(-last // scheme.per_word)
    with tensors.tensor(piece.name + SUFFIX, (words, out)) as stored:
        packed = _pick(stored[start:stop], piece.rows)
    with tensors.tensor(f"{piece.name}.g_idx", (features,)) as stored:
        group = stored.to(torch.int64)
    num_groups = scheme.groups(features)
    if len(group) and not 0 <= int(group.min()) <= int(group.max()) < num_groups:
        raise ModelError(
            f"weight {piece.name}.g_idx has values from {int(group.min())} to {int(group.max())},"
            f" but there are {num_groups} groups"
        )
    # word, output, value -> output, word, value
    values = _unpack(packed, scheme.bits).permute(1, 0, 2).flatten(1)
    offset = start * scheme.per_word
    return Grouped(
        bits=scheme.bits,
        q=values[:, first - offset : last - offset].contiguous(),
        scale=_scale(tensors, piece, num_groups),
        zero=_zero(scheme, tensors, piece, range(scheme.per_word)),
        group=group[first:last],
    )


def _awq(scheme: Scheme, tensors: Tensors, piece: Piece) -> Grouped:
    out, features = piece.shape
    first, last = piece.columns
    with tensors.tensor(piece.name + SUFFIX, (features, -(-out // scheme.per_word))) as stored:
        values = _unpack(stored[first:last], scheme.bits)
    q = _pick(_in_order(values, _AWQ_ORDER), piece.rows).T.contiguous()
    size = features if scheme.group_size < 0 else scheme.group_size
    return Grouped(
        bits=scheme.bits,
        q=q,
        scale=_scale(tensors, piece, scheme.groups(features)),
        zero=_zero(scheme, tensors, piece, _AWQ_ORDER),
        group=torch.arange(first, last) // size,
    )


def _scale(tensors: Tensors, piece: Piece, num_groups: int) -> Tensor:
    with tensors.tensor(f"{piece.name}.scales", (num_groups, piece.shape[0])) as stored:
        return _pick(stored, piece.rows).T.to(torch.float32, copy=True).contiguous()


def _zero(scheme: Scheme, tensors: Tensors, piece: Piece, order: Sequence[int]) -> Tensor:
    out, features = piece.shape
    shape = (scheme.groups(features), -(-out // scheme.per_word))
    with tensors.tensor(f"{piece.name}.qzeros", shape) as stored:
        values = _in_order(_unpack(stored, scheme.bits), order).to(torch.int16)
    return (_pick(values, piece.rows).T + scheme.zero_offset).contiguous()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [...] -> uint8 [..., values of a word]."""
    if bits == 8:
        return words.contiguous().view(torch.uint8).view(*words.shape, 4)
    pairs = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _in_order(values: Tensor, order: Sequence[int]) -> Tensor:
    """[rows, words, values] -> [rows, words x values]; `order`: where each of a word belongs."""
    return values[..., torch.argsort(torch.tensor(order))].flatten(1)


def _pick(matrix: Tensor, spans: Sequence[Span]) -> Tensor:
    """Some columns."""
    return torch.cat([matrix[:, start:stop] for start, stop in spans], 1)


READERS: dict[str, Callable[[Scheme, Tensors, Piece], Grouped]] = {"gptq": _gptq, "awq": _awq}
"""`quant_method` -> how a piece of a weight is read."""
