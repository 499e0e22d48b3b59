"""The few tokens of a row that still count, found without sorting the vocabulary.

Everything here is exact and depends on the row alone: a row's candidates are the same whatever rows
are processed beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MARGIN = 2.0**-20
WIDTHS = (64, 1024, 8192)  # how many of the best tokens are tried before all are sorted


@dataclass(slots=True)
class Candidates:
    """Some tokens of each of m rows, in the order of their ids.

    Attributes:
        ids: int64 [m, width]; short rows are padded with -1.
        scores: float32 [m, width]; padding scores -inf.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


def as_array(logits: Tensor) -> NDArray[np.float32]:
    """Logits as a contiguous float32 array, without a copy where they are that on the CPU."""
    array: NDArray[np.float32] = logits.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def pack(rows: Sequence[NDArray[np.float32]], ids: Sequence[NDArray[np.int64]]) -> Candidates:
    """Put the chosen ids of each row and their scores side by side.

    Args:
        rows: m times [vocab].
        ids: for each row its candidates' ids, ascending.
    """
    shape = (len(rows), max(map(len, ids)))
    packed = Candidates(np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32))
    for i, (row, chosen) in enumerate(zip(rows, ids, strict=True)):
        packed.ids[i, : len(chosen)] = chosen
        packed.scores[i, : len(chosen)] = row[chosen]
    return packed


def head(row: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids that surely include the `count` highest scores of a row, and all that tie with the last.

    Scores within a few units in the last place below the bound are included too, since dividing by
    a temperature can turn them into ties.

    Args:
        row: [vocab].
        count: at least 1.

    Returns:
        Ascending ids, usually few more than `count`. NaN is never among them, and a row with NaN
        may give fewer.
    """
    if count >= len(row):
        return np.arange(len(row))
    bound = _lower_bound(row, count)
    if np.isfinite(bound):
        bound -= abs(bound) * _MARGIN
    return np.flatnonzero(row >= bound)


def _lower_bound(row: NDArray[np.float32], count: int) -> float:
    """A value that at least `count` scores reach and few more: the count-th of group maxima."""
    groups = max(8 * count, 512)
    if 4 * groups > len(row):
        return float(np.partition(row, len(row) - count)[len(row) - count])
    depth = len(row) // groups
    maxima = row[: depth * groups].reshape(depth, groups).max(axis=0)
    return float(np.partition(maxima, groups - count)[groups - count])


def nucleus(
    row: NDArray[np.float32], temperature: float, top_p: float
) -> tuple[NDArray[np.int64], float] | None:
    """Ids that surely include all that top-p keeps of a row, if they are few.

    Args:
        row: [vocab], with a finite maximum.
        temperature: by which the scores are going to be divided.
        top_p: below 1.

    Returns:
        Ascending ids, and the mass of all other tokens where the likeliest one's is 1. None if
        thousands of tokens are not enough.
    """
    scaled = row / np.float32(temperature)
    mass = np.exp(scaled - scaled.max())
    total = float(mass.sum(dtype=np.float64))
    for width in WIDTHS:
        if width >= len(row):
            return None
        ids = head(row, width)
        inside = mass[ids]
        rest = max(total - float(inside.sum(dtype=np.float64)), 0.0)
        if (rest + float(inside.min())) / total <= 1 - top_p:
            return ids, rest
    return None
