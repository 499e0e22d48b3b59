"""Details of tokens: log-probability, rank, and the best alternatives, by TGIS's rules."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tgis.sampling.candidates import Candidates, as_array, head, pack
from tgis.sampling.device import details_of
from tgis.sampling.warpers import norm_row
from tgis.types import DetailParams, TokenDetails

Top = tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Scored:
    """What the details of m tokens are made of.

    Attributes:
        scores: [m], the tokens' own scores.
        norms: [m, 2], see `warpers.softmax`; read only in rows that want log-probabilities.
        ranks: [m].
        best: at least the `top_n` best alternatives of each row; None where no row wants any.
    """

    scores: NDArray[np.float32]
    norms: NDArray[np.float32]
    ranks: NDArray[np.int64]
    best: Candidates | None


def input_details(
    logits: Tensor, next_ids: Sequence[int], details: DetailParams
) -> list[TokenDetails]:
    """Details of input tokens under the model's raw logits.

    Args:
        logits: [k, vocab]; row j is what the model said before `next_ids[j]`.
        next_ids: the k input tokens.
        details: what is wanted of each.

    Returns:
        One entry per input token. A row that is not finite gives NaN and raises nothing.
    """
    if not len(next_ids):
        return []
    if logits.device.type != "cpu":
        return details_of(logits, next_ids, details)
    with np.errstate(all="ignore"):
        rows = list(as_array(logits))
        wanted = [details] * len(rows)
        scores = np.array([row[i] for row, i in zip(rows, next_ids, strict=True)])
        norms, ranks = norms_of(rows, wanted), ranks_of(rows, scores, wanted)
        scored = Scored(scores, norms, ranks, best_of(rows, wanted))
        return describe(scored, wanted, None if scored.best is None else scored.best.ids >= 0)


def norms_of(
    rows: Sequence[NDArray[np.float32]], details: Sequence[DetailParams]
) -> NDArray[np.float32]:
    """Log-normalisers of m whole rows, [m, 2]; zeros where no log-probabilities are wanted."""
    norms = np.zeros((len(rows), 2), np.float32)
    for i, (row, wanted) in enumerate(zip(rows, details, strict=True)):
        if wanted.logprobs:
            norms[i] = norm_row(row)
    return norms


def ranks_of(
    rows: Sequence[NDArray[np.float32]],
    scores: NDArray[np.float32],
    details: Sequence[DetailParams],
) -> NDArray[np.int64]:
    """1 + how many of a whole row are strictly greater, [m]; zeros where no ranks are wanted."""
    ranks = np.zeros(len(rows), np.int64)
    for i, (row, wanted) in enumerate(zip(rows, details, strict=True)):
        if wanted.ranks:
            ranks[i] = 1 + np.count_nonzero(row > scores[i])
    return ranks


def best_of(
    rows: Sequence[NDArray[np.float32]], details: Sequence[DetailParams]
) -> Candidates | None:
    """The alternatives that m whole rows may have to show."""
    if not any(wanted.top_n for wanted in details):
        return None
    nothing = np.empty(0, np.int64)
    return pack(
        rows,
        [
            head(row, wanted.top_n) if wanted.top_n else nothing
            for row, wanted in zip(rows, details, strict=True)
        ],
    )


def describe(
    scored: Scored, details: Sequence[DetailParams], valid: NDArray[np.bool_] | None
) -> list[TokenDetails]:
    """Shape the details of m tokens.

    Args:
        scored: the m tokens.
        details: what is wanted of each.
        valid: [m, width], which of `scored.best` may be shown.
    """
    logprobs = ((scored.scores - scored.norms[:, 0]) - scored.norms[:, 1]).tolist()
    ranks = scored.ranks.tolist()
    tops = _tops(scored, details, valid)
    return [
        TokenDetails(
            logprob=logprobs[i] if wanted.logprobs else 0.0,
            rank=ranks[i] if wanted.ranks else 0,
            top=tops[i],
        )
        for i, wanted in enumerate(details)
    ]


def _tops(
    scored: Scored, details: Sequence[DetailParams], valid: NDArray[np.bool_] | None
) -> list[Top]:
    """The n best of each row and all that tie with the last, at most 4n of them in id order."""
    if scored.best is None or valid is None:
        return [()] * len(details)
    scores, width = scored.best.scores, scored.best.scores.shape[1]
    counts = np.array([[wanted.top_n] for wanted in details])
    last = np.clip(width - counts, 0, width - 1)
    kept = valid & (scores >= np.take_along_axis(np.sort(scores, axis=1), last, axis=1))
    kept &= np.add.accumulate(kept, axis=1, dtype=np.int64) <= 4 * counts
    rows, columns = np.nonzero(kept)
    ids = scored.best.ids[rows, columns].tolist()
    norms = scored.norms[rows]
    logprobs = ((scores[rows, columns] - norms[:, 0]) - norms[:, 1]).tolist()
    ends = np.searchsorted(rows, np.arange(1, len(details) + 1)).tolist()
    return [
        _shown(ids[start:end], logprobs[start:end] if wanted.logprobs else None)
        for start, end, wanted in zip([0, *ends], ends, details, strict=False)
    ]


def _shown(ids: list[int], logprobs: list[float] | None) -> Top:
    """Alternatives as clients see them: best first with log-probabilities, else by ascending id."""
    if logprobs is None:
        return tuple((i, 0.0) for i in ids)
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda top: (-top[1], top[0])))
