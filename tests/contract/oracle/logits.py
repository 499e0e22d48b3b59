"""From logits to a token and its details: TGIS api, sections 6, 10 and 11, for one sequence.

Everything is a float32 row [vocab]. `Margins` records how far each decision is from falling the
other way, so that expectations that hang on a rounding error are never written down.
"""

import math
from dataclasses import dataclass, field

import torch
from tests.contract.oracle.request import Params

OFF = float("-inf")


@dataclass
class Margins:
    """The narrowest decision of each kind so far."""

    narrowest: dict[str, float] = field(default_factory=dict)

    def note(self, kind: str, margin: float) -> None:
        self.narrowest[kind] = min(margin, self.narrowest.get(kind, math.inf))


@dataclass(frozen=True)
class Details:
    """What a token's details say; `top` holds (id, logprob) in the order shown."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def process(
    logits: torch.Tensor,
    params: Params,
    seen: list[int],
    num_generated: int,
    eos_ids: list[int],
    margins: Margins,
) -> torch.Tensor:
    """Everything that happens to the logits before a token is chosen.

    Args:
        seen: ids that the repetition penalty holds against a token.
        num_generated: tokens generated before this one.
    """
    scores = logits.float().clone()
    if num_generated < params.min_new_tokens:
        scores[eos_ids] = OFF
    elif params.length_penalty is not None:
        start, decay = params.length_penalty
        past = num_generated - start
        if past > 0:
            for eos in eos_ids:
                scores[eos] += scores[eos].abs() * (decay**past - 1)
    if params.repetition_penalty != 1:
        for token in sorted(set(seen)):
            score, theta = scores[token], params.repetition_penalty
            scores[token] = score * theta if score < 0 else score / theta
    if params.sample:
        scores /= params.temperature
        scores = top_k(scores, params.top_k, margins)
        scores = top_p(scores, params.top_p, margins)
        scores = typical_p(scores, params.typical_p, margins)
    return scores


def top_k(scores: torch.Tensor, k: int, margins: Margins) -> torch.Tensor:
    if not 0 < k < len(scores):
        return scores
    ordered = scores.sort(descending=True).values
    margins.note("top_k", float(ordered[k - 1] - ordered[k]))
    return scores.masked_fill(scores < ordered[k - 1], OFF)


def top_p(scores: torch.Tensor, p: float, margins: Margins) -> torch.Tensor:
    if p >= 1:
        return scores
    ordered, order = scores.sort()
    mass = ordered.softmax(-1).cumsum(-1)
    cut = 1 - torch.tensor(p)
    margins.note("top_p", float((mass[:-1] - cut).abs().min()))
    drop = mass <= cut
    drop[-1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), OFF)


def typical_p(scores: torch.Tensor, p: float, margins: Margins) -> torch.Tensor:
    if not 0 < p < 1:
        return scores
    surprise = -scores.log_softmax(-1)
    entropy = (surprise * torch.exp(-surprise)).nansum()
    shifted = (surprise - entropy).abs()
    ordered, order = shifted.sort()
    mass = scores[order].softmax(-1).cumsum(-1)
    last = min(int((mass < torch.tensor(p)).sum()), len(scores) - 1)
    margins.note("typical_p mass", float((mass - p).abs().min()))
    if last + 1 < len(scores) and math.isfinite(ordered[last + 1]):
        margins.note("typical_p order", float(ordered[last + 1] - ordered[last]))
    return scores.masked_fill(shifted > ordered[last], OFF)


def choose(scores: torch.Tensor, sample: bool, generator: torch.Generator, margins: Margins) -> int:
    """The best score, or the best race time: probability over exponential noise."""
    if sample:
        probabilities = scores.softmax(-1)
        noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
        race = probabilities / noise
    else:
        race = scores
    best, second = race.topk(2).values.tolist()
    margins.note("choice", math.log(best / second) if sample and second else best - second)
    return int(race.argmax())


def details_of(
    scores: torch.Tensor, token: int, params: Params, generated: bool, margins: Margins
) -> Details:
    """Details of `token` by the scores it was chosen from (or, of the input, by raw logits)."""
    logprobs = scores.log_softmax(-1)
    logprob, rank = 0.0, 0
    alone = int((scores > OFF).sum()) == 1
    if params.logprobs:
        logprob = float(logprobs[token])
        if not alone:
            margins.note("logprob", -logprob / 10)
    if params.ranks:
        rank = 1 + int((scores > scores[token]).sum())
        others = torch.cat([scores[:token], scores[token + 1 :]])
        margins.note("rank", float((others - scores[token]).abs().min()))
    return Details(logprob, rank, _top(scores, logprobs, params, generated, margins))


def _top(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    params: Params,
    generated: bool,
    margins: Margins,
) -> list[tuple[int, float]]:
    n = min(params.top_n, len(scores))
    if n == 0:
        return []
    ordered = scores.sort(descending=True).values
    shown = scores >= ordered[n - 1]
    if generated:
        shown &= scores > OFF
    ids: list[int] = shown.nonzero().flatten().tolist()[: 4 * n]
    _note_gaps(ordered.tolist(), n, params.logprobs, margins)
    if not params.logprobs:
        return [(i, 0.0) for i in ids]
    ids.sort(key=lambda i: (-float(logprobs[i]), i))
    if len(ids) > 1:
        margins.note("top logprob", -float(logprobs[ids[0]]) / 10)
    return [(i, float(logprobs[i])) for i in ids]


def _note_gaps(ordered: list[float], n: int, order_matters: bool, margins: Margins) -> None:
    """The gap below the last candidate and, where their order shows, those between candidates."""
    for i in range(0 if order_matters else n - 1, n):
        if i + 1 < len(ordered) and ordered[i + 1] > OFF:
            margins.note("top_n", ordered[i] - ordered[i + 1])
