"""Logits processing: penalties on whole rows, then warpers on the candidates of sampling rows.

Order and formulae are those of TGIS (`utils/tokens.py`, `utils/logits_process.py`): EOS mask or
length penalty, repetition penalty, temperature, top-k, top-p (Holtzman et al. 2020), typical-p
(Meister et al. 2022). All arithmetic on scores is float32; masses are summed one after the other in
float64, so that padding never changes a result.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

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


def warp(scores: NDArray[np.float32], params: Sequence[SamplingParams]) -> NDArray[np.float32]:
    """Apply temperature, top-k, top-p and typical-p.

    Args:
        scores: [m, width] in the order of token ids, -inf for padding; each row without NaN and
            with a finite maximum.
        params: the m rows' parameters, with top_k <= width or enough candidates for it.

    Returns:
        [m, width], -inf for tokens that cannot be chosen.
    """
    scores = scores / _column(params, "temperature")
    _apply(scores, params, [p.top_k > 0 for p in params], _top_k)
    _apply(scores, params, [p.top_p < 1.0 for p in params], _top_p)
    _apply(scores, params, [0.0 < p.typical_p < 1.0 for p in params], _typical_p)
    return scores


def softmax(scores: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities of each row, and the row's log-normaliser.

    Args:
        scores: [m, width], each row with a finite maximum.

    Returns:
        [m, width] and [m, 2]: the maximum and log(sum(exp(score - maximum))), apart for precision.
    """
    top = scores.max(axis=1, keepdims=True)
    mass = np.exp(scores - top)
    total = np.add.accumulate(mass, axis=1, dtype=np.float64)[:, -1:].astype(np.float32)
    return mass / total, np.concatenate([top, np.log(total)], axis=1)


def softmax_row(row: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`softmax` of one whole row, [vocab] and [2]: never padded, so a faster sum serves it."""
    top = row.max()
    mass = np.exp(row - top)
    total = mass.sum()
    return mass / total, np.stack([top, np.log(total)])


def _column(params: Sequence[SamplingParams], name: str) -> NDArray[np.float32]:
    """One parameter of all rows: float32 [m, 1]."""
    return np.array([[getattr(p, name)] for p in params], np.float32)


def _apply(
    scores: NDArray[np.float32],
    params: Sequence[SamplingParams],
    wanted: Sequence[bool],
    warper: Callable[[NDArray[np.float32], Sequence[SamplingParams]], NDArray[np.bool_]],
) -> None:
    """Set to -inf what the warper drops, in the rows that want it."""
    rows = [i for i, want in enumerate(wanted) if want]
    if len(rows) == len(params):
        scores[warper(scores, params)] = -np.inf
    elif rows:
        part = scores[rows]
        part[warper(part, [params[i] for i in rows])] = -np.inf
        scores[rows] = part


def _top_k(scores: NDArray[np.float32], params: Sequence[SamplingParams]) -> NDArray[np.bool_]:
    """Drop what is below the k-th highest score; ties stay."""
    width = scores.shape[1]
    last = np.array([[max(width - p.top_k, 0)] for p in params])
    return scores < np.take_along_axis(np.sort(scores, axis=1), last, axis=1)


def _top_p(scores: NDArray[np.float32], params: Sequence[SamplingParams]) -> NDArray[np.bool_]:
    """Drop the least likely tokens whose masses add up to at most 1 - p; never the likeliest."""
    order = _ascending(scores)
    probs, _ = softmax(scores)
    mass = _running_sum(np.take_along_axis(probs, order, axis=1))
    drop = mass <= 1 - _column(params, "top_p")
    drop[:, -1] = False
    return _undo(order, drop)


def _typical_p(scores: NDArray[np.float32], params: Sequence[SamplingParams]) -> NDArray[np.bool_]:
    """Keep the tokens closest to the expected surprise until their masses reach p."""
    probs, norm = softmax(scores)
    surprise = -((scores - norm[:, :1]) - norm[:, 1:])
    terms = np.where(probs > 0, surprise * probs, np.float32(0))
    entropy = np.add.accumulate(terms, axis=1, dtype=np.float64)[:, -1:].astype(np.float32)
    distance = abs(surprise - entropy)
    order = _ascending(distance)
    mass = _running_sum(np.take_along_axis(probs, order, axis=1))
    reached = (mass < _column(params, "typical_p")).sum(axis=1, keepdims=True)
    last = np.take_along_axis(order, np.minimum(reached, scores.shape[1] - 1), axis=1)
    dropped: NDArray[np.bool_] = distance > np.take_along_axis(distance, last, axis=1)
    return dropped


def _running_sum(masses: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.add.accumulate(masses, axis=1, dtype=np.float64).astype(np.float32)


def _ascending(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Stable argsort of each row; one sort of integers (value, column) beats argsort by far."""
    bits = (values + np.float32(0)).view(np.int32)  # the addition turns -0 into 0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(values.shape[1])
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF


def _undo(order: NDArray[np.int64], flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Bring flags of sorted columns back to the columns' own places."""
    restored = np.empty_like(flags)
    np.put_along_axis(restored, order, flags, axis=1)
    return restored
