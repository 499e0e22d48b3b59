"""Logits processing: penalties on whole rows, then warpers on the candidates of sampling rows.

Order and formulae are those of TGIS (`utils/tokens.py`, `utils/logits_process.py`): EOS mask or
length penalty, repetition penalty, temperature, top-k, top-p (Holtzman et al. 2020), typical-p
(Meister et al. 2022). All arithmetic on scores is float32; masses are summed one after the other in
float64, so that padding never changes a result.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tgis.sampling.candidates import WIDTHS, head
from tgis.sampling.state import SequenceState
from tgis.types import SamplingParams

# A penalty saturates here instead of overflowing: no parameter can make a finite row infinite.
_LIMIT = 1e30
_MAX_EXPONENT = 60.0


def penalise(
    logits: NDArray[np.float32], rows: Sequence[SequenceState], eos_ids: Sequence[int]
) -> None:
    """Apply the EOS mask, length and repetition penalties in place.

    Args:
        logits: [n, vocab], contiguous; rows without penalties are not touched.
        rows: the n sequences.
        eos_ids: every id that ends a sequence.
    """
    for i, row in enumerate(rows):
        if row.num_generated < row.params.min_new_tokens:
            logits[i, eos_ids] = -np.inf
        elif row.params.length_penalty_decay != 1.0:
            _penalise_length(logits[i], row, eos_ids)
    repeating = [(i, row) for i, row in enumerate(rows) if row.seen is not None]
    if repeating:
        _penalise_repetition(logits, repeating)


def _penalise_length(
    logits: NDArray[np.float32], row: SequenceState, eos_ids: Sequence[int]
) -> None:
    """Raise EOS by |score| * (decay ** tokens past the start - 1)."""
    past = row.num_generated - row.params.length_penalty_start
    if past <= 0:
        return
    exponent = past * math.log(row.params.length_penalty_decay)
    gain = math.expm1(min(exponent, _MAX_EXPONENT))
    for eos in eos_ids:
        score = float(logits[eos])
        if math.isfinite(score):
            logits[eos] = min(score + abs(score) * gain, max(score, _LIMIT))


def _penalise_repetition(
    logits: NDArray[np.float32], rows: Sequence[tuple[int, SequenceState]]
) -> None:
    """Divide each seen id's score by the penalty, or multiply where it is negative."""
    vocab_size = logits.shape[1]
    seen = [(i * vocab_size, row.seen.ids) for i, row in rows if row.seen is not None]
    where = np.concatenate([offset + ids for offset, ids in seen])
    penalty = np.repeat(
        np.array([row.params.repetition_penalty for _, row in rows], np.float32),
        [len(ids) for _, ids in seen],
    )
    flat = logits.reshape(-1)
    scores = flat[where]
    penalised = np.where(scores < 0, scores * penalty, scores / penalty)
    limit = np.maximum(abs(scores), np.float32(_LIMIT))  # infinite where the score is
    flat[where] = np.clip(penalised, -limit, limit)


def warp(
    scores: NDArray[np.float32],
    params: Sequence[SamplingParams],
    rest: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """Apply temperature, top-k and top-p.

    Args:
        scores: [m, width] in the order of token ids, -inf for padding; each row without NaN and
            with a finite maximum. What is missing of a row must be sure to be dropped.
        params: the m rows' parameters.
        rest: [m], the mass of each row's missing tokens that top-p has to drop before any that are
            here, where the likeliest token's mass is 1. Default: none.

    Returns:
        [m, width], -inf for tokens that cannot be chosen.
    """
    width = scores.shape[1]
    scores = np.divide(scores, _column([p.temperature for p in params]))
    if any(p.top_k for p in params):
        drop = _below_top_k(scores, [min(p.top_k, width) or width for p in params])
        scores[drop] = -np.inf
    if any(p.top_p < 1.0 for p in params):
        drop = _outside_top_p(scores, params, np.array(rest or [0.0] * len(params))[:, None])
        scores[drop] = -np.inf
    return scores


def warp_row(row: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float32]:
    """Apply all warpers to one whole row, [vocab]; see `warp`."""
    scores: NDArray[np.float32] = warp(row[None], [params])[0]
    if 0.0 < params.typical_p < 1.0:
        scores[_untypical(scores, params.typical_p)] = -np.inf
    return scores


def softmax(scores: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities of each row, and the row's log-normaliser.

    Args:
        scores: [m, width], each row with a finite maximum.

    Returns:
        [m, width] and [m, 2]: the maximum and log(sum(exp(score - maximum))), apart for precision.
    """
    top, mass, total = _masses(scores, np.zeros((len(scores), 1)))
    return mass / total, np.concatenate([top, np.log(total)], axis=1)


def softmax_row(row: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`softmax` of one whole row, [vocab] and [2]: never padded, so a faster sum serves it."""
    top, mass, total = _masses_of_row(row)
    return mass / total, np.stack([top, np.log(total)])


def norm_row(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log-normaliser alone of one whole row, [2]."""
    top, _, total = _masses_of_row(row)
    return np.stack([top, np.log(total)])


def _masses_of_row(row: NDArray[np.float32]) -> tuple[np.float32, NDArray[np.float32], np.float32]:
    top = row.max()
    mass = row - top
    np.exp(mass, out=mass)
    return top, mass, mass.sum()


def _masses(
    scores: NDArray[np.float32], rest: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Each row's maximum, its tokens' masses (the likeliest's is 1), and their sum with rest."""
    top = scores.max(axis=1, keepdims=True)
    mass = np.exp(scores - top)
    total = np.add.accumulate(mass, axis=1, dtype=np.float64)[:, -1:] + rest
    return top, mass, total.astype(np.float32)


def _column(values: Sequence[float]) -> NDArray[np.float32]:
    """One number per row, [m, 1]."""
    return np.array(values, np.float32)[:, None]


def _below_top_k(scores: NDArray[np.float32], counts: Sequence[int]) -> NDArray[np.bool_]:
    """What is below the k-th highest score; ties stay."""
    last = scores.shape[1] - np.array(counts)[:, None]
    return np.less(scores, np.take_along_axis(np.sort(scores, axis=1), last, axis=1))


def _outside_top_p(
    scores: NDArray[np.float32], params: Sequence[SamplingParams], rest: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The least likely tokens whose masses add up to at most 1 - p; never the likeliest."""
    order = _ascending(scores)
    _, mass, total = _masses(scores, rest)
    probs = np.take_along_axis(mass / total, order, axis=1)
    sums = np.add.accumulate(probs, axis=1, dtype=np.float64) + rest / total
    cut = np.where(
        _column([p.top_p for p in params]) < 1, 1 - _column([p.top_p for p in params]), -1
    )
    drop = sums.astype(np.float32) <= cut
    drop[:, -1] = False
    restored = np.empty_like(drop)
    np.put_along_axis(restored, order, drop, axis=1)
    return restored


def _untypical(row: NDArray[np.float32], mass: float) -> NDArray[np.bool_]:
    """All but the tokens closest to the expected surprise whose masses reach p.

    Neighbours in that order differ by about one unit in the last place, so that normalising and
    summing are left to the very operators that TGIS uses. More than 32,767 elements torch would sum
    in parallel, and then by an order that the number of threads decides.
    """
    logprobs = torch.from_numpy(row).log_softmax(-1).numpy()
    terms = torch.from_numpy(logprobs * np.exp(logprobs))
    parts = [part.nansum() for part in torch.split(terms, 32767)]
    distance = abs(-logprobs + torch.stack(parts).sum().numpy())
    probs, _ = softmax_row(row)
    for width in (*WIDTHS, len(row)):
        near = head(-distance, width)
        order = near[_ascending(distance[None, near])[0]]
        sums = np.add.accumulate(probs[order], dtype=np.float64).astype(np.float32)
        reached = int((sums < np.float32(mass)).sum())
        if reached < len(order):
            break
    dropped: NDArray[np.bool_] = distance > distance[order[min(reached, len(order) - 1)]]
    return dropped


def _ascending(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Stable argsort of each row; one sort of integers (value, column) beats argsort by far."""
    bits = (values + np.float32(0)).view(np.int32)  # the addition turns -0 into 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(values.shape[1])
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF
