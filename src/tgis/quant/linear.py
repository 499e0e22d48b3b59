"""The one Linear factory: the format of a checkpoint's weight decides its layer.

A layer is called with rows [n, in_features] and returns [n, out_features]. It may be put together
from several checkpoint tensors (fused projections) and from parts of them (a rank's share).
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tgis.errors import ModelError
from tgis.quant import tiles

log = logging.getLogger(__name__)

Span = tuple[int, int]

_COPY_ROWS = 4096  # of a weight, at a time
PACK_ROWS = 32  # a pack for so many rows is within 5 % of the best at 1, 8, 32 and 128 rows


Linear = Callable[[Tensor], Tensor]
"""x [n, in_features] -> [n, out_features]"""

MakeLinear = Callable[[Tensor, Tensor | None], Linear]
"""(weight [out, in], bias [out] or None) -> layer; the caller forgets both."""


class Tensors(Protocol):
    """Stored tensors by name, such as `hub.safetensors.Checkpoint`."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> AbstractContextManager[Tensor]:
        """A stored tensor, which must have this shape."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a checkpoint's weight [out, in] that makes some of a layer's output features.

    `rows` of it in this order, and `columns`; `transposed` weights are stored as [in, out].
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[Span, ...]
    columns: Span
    transposed: bool = False

    @property
    def out_features(self) -> int:
        """Output features that this piece makes."""
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True, slots=True)
class LinearSource:
    """A layer as pieces, one below the other. All have a bias in the checkpoint, or none has."""

    pieces: tuple[Piece, ...]
    has_bias: bool
    adds_bias: bool = True  # False where another rank adds it

    @property
    def out_features(self) -> int:
        """Rows of the layer's weight."""
        return sum(piece.out_features for piece in self.pieces)

    @property
    def in_features(self) -> int:
        """Columns of the layer's weight."""
        start, stop = self.pieces[0].columns
        return stop - start


def load_linear(
    tensors: Tensors,
    source: LinearSource,
    dtype: torch.dtype,
    make: MakeLinear | None = None,
    formats: "Formats | None" = None,
) -> Linear:
    """Make a layer from the checkpoint.

    Args:
        tensors: the checkpoint.
        source: what of it the layer is made of.
        dtype: of the arithmetic.
        make: makes the layer of a weight that is not quantised; `make_linear` unless given.
        formats: in which weights may be stored; `FORMATS` unless given.

    Raises:
        ModelError: a tensor is missing, has another shape, or is of a format not known here.
    """
    name = source.pieces[0].name
    known = (formats or FORMATS).items()
    load = next((load for suffix, load in known if name + suffix in tensors), None)
    if load is None:
        raise ModelError(f"weight {name}.weight does not exist")
    return load(tensors, source, dtype, make or make_linear)


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer of a weight [out, in] in memory, which the caller should then forget."""
    on_cpu = weight.device.type == "cpu"
    return packed(weight, bias) if on_cpu and can_pack(weight.dtype) else dense(weight, bias)


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """PyTorch's own layer, for every dtype and device."""
    return lambda x: functional.linear(x, weight, bias)


def packed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer on a copy of the weight in oneDNN's blocked layout, for all numbers of rows."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    return partial(tiles.multiplied, lambda x: multiply(x, blocked, bias, "none", [], ""))


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether `packed` works here and computes the same; tried once per dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, generator=generator).to(dtype)
    weight = torch.randn(24, 32, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    try:
        computed = packed(weight, bias)(x)
    except (RuntimeError, AttributeError) as error:
        log.warning("weights of %s are not packed: %s", dtype, str(error).partition("\n")[0])
        return False
    expected = functional.linear(x.float(), weight.float(), bias.float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    if (computed.float() - expected).abs().max() <= tolerance:
        return True
    log.warning("weights of %s are not packed: the packed layer computes wrongly", dtype)
    return False


def _load_dense(
    tensors: Tensors, source: LinearSource, dtype: torch.dtype, make: MakeLinear
) -> Linear:
    weight = torch.empty(source.out_features, source.in_features, dtype=dtype)
    bias = torch.empty(source.out_features, dtype=dtype) if source.has_bias else None
    row = 0
    for piece in source.pieces:
        target = slice(row, row + piece.out_features)
        _copy_weight(tensors, piece, weight[target])
        if bias is not None:
            copy_bias(tensors, piece, bias[target])
        row += piece.out_features
    return make(weight, bias if source.adds_bias else None)


def _copy_weight(tensors: Tensors, piece: Piece, target: Tensor) -> None:
    name = f"{piece.name}.weight"
    shape = piece.shape[::-1] if piece.transposed else piece.shape
    at, height = 0, piece.out_features if piece.transposed else _COPY_ROWS
    for first, last in piece.rows:
        for start in range(first, last, height):
            stop = min(start + height, last)
            # Taken anew for each block: what has been read of a file does not stay in memory.
            with tensors.tensor(name, shape) as stored:
                matrix = stored.T if piece.transposed else stored
                target[at : at + stop - start] = matrix[start:stop, slice(*piece.columns)]
            at += stop - start


def copy_bias(tensors: Tensors, piece: Piece, target: Tensor) -> None:
    """Copy the bias of a piece's output features."""
    with tensors.tensor(f"{piece.name}.bias", piece.shape[:1]) as stored:
        _copy_rows(stored, piece.rows, target)


def _copy_rows(source: Tensor, rows: tuple[Span, ...], target: Tensor) -> None:
    at = 0
    for start, stop in rows:
        target[at : at + stop - start].copy_(source[start:stop])
        at += stop - start


Formats = dict[str, Callable[[Tensors, LinearSource, torch.dtype, MakeLinear], Linear]]
"""The suffix by which a format's weights are known -> how a layer is loaded."""

FORMATS: Formats = {".weight": _load_dense}
"""What every checkpoint may hold."""
