"""Sampling where the logits are: the table of `warpers` over a whole batch, in torch.

All rows are worked on at once, nothing is waited for, and what is chosen comes to the host in one
copy. Greedy rows give what the host's sampler gives. Sampled rows draw from a noise of their own: a
hash of (seed, tokens so far, token id) instead of a stream (splitmix64; Steele et al. 2014), so
that a row needs no state, depends on no neighbour, and is the same on every device.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tgis.sampling.state import SequenceState
from tgis.types import DetailParams, SamplingParams, TokenDetails

States = Sequence[SequenceState]
Noise = Callable[[Tensor, int], Tensor]
"""(int64 [n, 2]: seed and tokens so far of each row, width) -> positive float32 [n, width]."""

_LIMIT = 1e30  # as `warpers`: a penalty saturates there
_MAX_EXPONENT = 60.0
_TIES = 4  # times as many alternatives as asked for are shown at most
_INF = float("inf")


class Picked(NamedTuple):
    """What was chosen, on the device; see `fetch`.

    Attributes:
        tokens: int64 [n].
        is_sound: bool [n]: the row has a finite maximum.
        details: float64 [n, 2 + 2 * width]: log-probability, rank, ids and log-probabilities of
            alternatives; an id of -1 is none. Width is 0 where nobody wants alternatives; no
            columns at all where nobody wants details.
    """

    tokens: Tensor
    is_sound: Tensor
    details: Tensor


def pick(
    logits: Tensor, states: States, eos_ids: Sequence[int], noise: Noise | None = None
) -> Picked:
    """Choose a token for each row.

    Args:
        logits: float32 [n, vocab]; overwritten.
        states: the n sequences; they do not move.
        eos_ids: every id that ends a sequence.
        noise: another noise than `hashed_noise`.
    """
    _penalise(logits, states, eos_ids)
    sampled = [i for i, state in enumerate(states) if state.params.do_sample]
    top = logits.amax(-1)
    chosen = _first_of(logits, top)
    if sampled:
        rows = _at(logits.device, sampled)
        params = [states[i].params for i in sampled]
        scores = _warp(
            logits[rows] / _column(logits.device, [p.temperature for p in params]), params
        )
        seeds = [
            [p.seed - (p.seed >> 63 << 64), states[i].num_generated]
            for i, p in zip(sampled, params, strict=True)
        ]
        drawn = (noise or hashed_noise)(_at(logits.device, seeds), logits.shape[1])
        ratio = scores.softmax(-1) / drawn
        chosen[rows] = _first_of(ratio, ratio.amax(-1))
        top[rows] = scores.amax(-1)
        logits[rows] = scores
    details = _details(logits, chosen, [state.details for state in states], _possible)
    return Picked(chosen, top.isfinite(), details)


def fetch(picked: Picked, wanted: Sequence[DetailParams]) -> list[tuple[int, TokenDetails] | None]:
    """Bring what was chosen to the host: the one moment that waits for the device.

    Returns:
        Token and details of each row; None where its logits are not sound.
    """
    columns = [picked.tokens[:, None], picked.is_sound[:, None], picked.details]
    table = torch.cat([column.double() for column in columns], 1).tolist()
    return [
        (int(row[0]), _described(row[2:], want)) if row[1] else None
        for row, want in zip(table, wanted, strict=True)
    ]


def details_of(logits: Tensor, ids: Sequence[int], wanted: DetailParams) -> list[TokenDetails]:
    """Details of given tokens under raw logits [n, vocab]; see `logprobs.input_details`."""
    tokens = _at(logits.device, list(ids))
    table = _details(logits.float(), tokens, [wanted] * len(ids), _any).tolist()
    return [_described(row, wanted) for row in table]


def hashed_noise(keys: Tensor, width: int) -> Tensor:
    """Exponential noise by hashing; see `Noise`."""
    key = _mixed(_mixed(keys[:, 0]) + keys[:, 1])
    bits = _mixed(key[:, None] + torch.arange(1, width + 1, device=keys.device))
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().float()


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser of x times its constant, modulo 2^64."""
    x = x * -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _at(device: torch.device, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers on the device, by a copy that nobody waits for."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def _column(device: torch.device, values: Sequence[float]) -> Tensor:
    """One number per row, float32 [n, 1]."""
    return _at(device, values, torch.float32)[:, None]


def _first_of(values: Tensor, top: Tensor) -> Tensor:
    """The lowest id with each row's largest value, int64 [n]; of a NaN any."""
    width = values.shape[1]
    ids = torch.arange(width, device=values.device)
    return torch.where(values == top[:, None], ids, width).amin(-1).clamp_(max=width - 1)


def _penalise(logits: Tensor, states: States, eos_ids: Sequence[int]) -> None:
    """As `warpers.penalise`."""
    masked, lengthened, gains = [], [], []
    for i, state in enumerate(states):
        params = state.params
        past = state.num_generated - params.length_penalty_start
        if state.num_generated < params.min_new_tokens:
            masked.append(i)
        elif params.length_penalty_decay != 1.0 and past > 0:
            exponent = past * math.log(params.length_penalty_decay)
            lengthened.append(i)
            gains.append(math.expm1(min(exponent, _MAX_EXPONENT)))
    device, eos = logits.device, list(eos_ids)
    if masked and eos:
        logits[_at(device, masked)[:, None], _at(device, eos)] = -_INF
    if lengthened and eos:
        where = _at(device, lengthened)[:, None], _at(device, eos)
        scores = logits[where].double()
        raised = scores + scores.abs() * _at(device, gains, torch.float64)[:, None]
        raised = torch.minimum(raised, scores.clamp(min=_LIMIT))
        logits[where] = torch.where(scores.isfinite(), raised, scores).float()
    _penalise_repetition(logits, states)


def _penalise_repetition(logits: Tensor, states: States) -> None:
    width = logits.shape[1]
    where: list[int] = []
    penalties: list[float] = []
    for i, state in enumerate(states):
        if state.seen is not None:
            ids = state.seen.ids.tolist()
            where += [i * width + token for token in ids]
            penalties += [state.params.repetition_penalty] * len(ids)
    if not where:
        return
    index, penalty = _at(logits.device, where), _at(logits.device, penalties, torch.float32)
    flat = logits.view(-1)
    scores = flat[index]
    limit = scores.abs().clamp(min=_LIMIT)
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    flat[index] = torch.minimum(torch.maximum(penalised, -limit), limit)


def _warp(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """top-k, top-p and typical-p of scores that are divided by the temperature already."""
    device, width = scores.device, scores.shape[1]
    if any(p.top_k for p in params):
        counts = _at(device, [min(p.top_k, width) or width for p in params])
        best = scores.topk(min(max(p.top_k for p in params), width), -1).values
        bound = best.gather(1, (counts - 1).clamp(max=best.shape[1] - 1)[:, None])
        limited = _at(device, [bool(p.top_k) for p in params], torch.bool)[:, None]
        scores = scores.masked_fill((scores < bound) & limited, -_INF)
    if any(p.top_p < 1.0 for p in params):
        top_p = _column(device, [p.top_p for p in params])
        ordered, order = scores.sort(dim=-1, stable=True)
        sums = ordered.softmax(-1).cumsum(-1, dtype=torch.float64).float()
        drop = (sums <= 1 - top_p) & (top_p < 1)
        drop[:, -1] = False
        scores = scores.masked_fill(torch.empty_like(drop).scatter_(1, order, drop), -_INF)
    if any(0.0 < p.typical_p < 1.0 for p in params):
        scores = scores.masked_fill(_untypical(scores, params), -_INF)
    return scores


def _untypical(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """All but the tokens closest to the expected surprise whose masses reach p."""
    mass = _column(scores.device, [p.typical_p for p in params])
    logprobs = scores.log_softmax(-1)
    probs = logprobs.exp()
    distance = (-logprobs + (logprobs * probs).nansum(-1, keepdim=True)).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    sums = probs.gather(1, order).cumsum(-1, dtype=torch.float64).float()
    last = (sums < mass).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    return (distance > ordered.gather(1, last)) & (mass > 0) & (mass < 1)


def _possible(scores: Tensor) -> Tensor:
    return scores > -_INF


def _any(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def _details(
    scores: Tensor,
    tokens: Tensor,
    wanted: Sequence[DetailParams],
    shown: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `Picked.details`.

    Args:
        shown: which alternatives may be shown.
    """
    if not any(want.logprobs or want.ranks or want.top_n for want in wanted):
        return scores.new_empty((len(tokens), 0), dtype=torch.float64)
    own = scores.gather(1, tokens[:, None])
    top = scores.amax(-1, keepdim=True)
    log_sum = (scores - top).exp().sum(-1, keepdim=True).log()
    ranks = 1 + (scores > own).sum(-1, keepdim=True)
    columns = [((own - top) - log_sum).double(), ranks.double()]
    most = min(max(want.top_n for want in wanted), scores.shape[1])
    if most:
        counts = _at(scores.device, [min(want.top_n, most) for want in wanted])[:, None]
        ids = _alternatives(scores, counts, most, shown)
        values = scores.gather(1, ids.clamp(min=0))
        columns += [ids.double(), ((values - top) - log_sum).double()]
    return torch.cat(columns, 1)


def _alternatives(
    scores: Tensor, counts: Tensor, most: int, shown: Callable[[Tensor], Tensor]
) -> Tensor:
    """Ids of each row's best and of all that tie with the last, ascending, then -1."""
    bound = scores.topk(most, -1).values.gather(1, (counts - 1).clamp(min=0))
    kept = (scores >= bound) & shown(scores) & (counts > 0)
    kept &= kept.cumsum(-1) <= _TIES * counts
    width = scores.shape[1]
    ids = torch.arange(width, device=scores.device)
    first = torch.where(kept, ids, width).topk(min(_TIES * most, width), -1, largest=False).values
    return torch.where(first < width, first, -1)


def _described(row: Sequence[float], want: DetailParams) -> TokenDetails:
    """Details as clients see them: best first with log-probabilities, else by ascending id."""
    if not row:
        return TokenDetails()
    half = (len(row) - 2) // 2
    pairs = zip(row[2 : 2 + half], row[2 + half :], strict=True)
    top = [(int(i), logprob if want.logprobs else 0.0) for i, logprob in pairs if i >= 0]
    if want.logprobs:
        top.sort(key=lambda pair: (-pair[1], pair[0]))
    return TokenDetails(
        logprob=row[0] if want.logprobs else 0.0,
        rank=int(row[1]) if want.ranks else 0,
        top=tuple(top) if want.top_n else (),
    )
