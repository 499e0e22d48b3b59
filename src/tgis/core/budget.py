"""Whether a batch will fit: pure arithmetic over a model of the memory, with TGIS's rules.

A running or candidate sequence is a `Load`: the tokens that it has now, and the tokens that it may
still generate. The weight of a batch must never exceed a limit, neither now nor while its members
generate and end one after the other. A coarse test assumes that all of them last as long as the
longest; where that fails, an exact test walks through the ends (TGIS router, queue and batch
types).

`PagedBudget` is for engines whose sequences take what they need; `PaddedBudget` for those that pad
all sequences of a batch to the longest.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from typing import NamedTuple, Protocol

from tgis.errors import ConfigError


class Load(NamedTuple):
    """What a sequence weighs."""

    tokens: int  # input and generated so far
    remaining: int  # that it may still generate


class Verdict(Enum):
    """What a budget says to a candidate."""

    FITS = auto()
    FITS_EXACTLY = auto()  # thanks to the exact test only
    NO_ROOM = auto()
    PREFILL_WEIGHT = auto()  # the new prompts together are too heavy
    PREFILL_PADDING = auto()  # ... or of too different lengths

    @property
    def fits(self) -> bool:
        """Whether the candidate may join."""
        return self in (Verdict.FITS, Verdict.FITS_EXACTLY)


class Room(Protocol):
    """What is left beside the running sequences, while candidates are added one by one."""

    def fits(self, load: Load) -> Verdict:
        """Whether a candidate may join the running sequences and those added."""

    def add(self, load: Load) -> None:
        """A candidate joins."""


class Budget(Protocol):
    """The arithmetic of one kind of engine."""

    def room(self, running: Sequence[Load]) -> Room:
        """What is left beside these."""

    def may_add(self, running: Sequence[Load], num_waiting: int, num_steps: int) -> bool:
        """Whether it is time to let waiting sequences join the running ones.

        Args:
            num_steps: since the last ones joined.
        """

    def batch_tokens(self, lengths: Iterable[int]) -> int:
        """Tokens of a batch of sequences of these lengths, padding included."""

    def check_length(self, max_sequence_length: int) -> None:
        """Raise ConfigError if one sequence of full length does not fit by itself."""


def _check(limit: float, prefill: float, next_token: float, length: int) -> None:
    """TGIS's startup check and its texts."""
    for weight, name in ((prefill, "prefill"), (next_token, "next-token")):
        if int(weight) > limit:
            raise ConfigError(
                f"The provided max_sequence length ({length}) results in a {name} batch weight "
                f"that exceeds the estimated capacity ({int(limit)})"
            )


class PagedBudget:
    """Sequences take what they need; the weights of TGIS's flash/paged batches.

    Args:
        limit: weight that a batch may have; in tokens if the gradients are 1. inf = no limit.
        horizon: steps to look ahead. inf = TGIS's rule, by which every sequence may generate all
            that it asked for; less admits more, at the risk of a preemption later.
        gradient: weight of one token.
        prefill_gradient: weight of one new token during its prefill.
    """

    def __init__(
        self,
        limit: float,
        *,
        horizon: float = math.inf,
        gradient: float = 1.0,
        prefill_gradient: float = 0.0,
    ) -> None:
        self.limit = limit
        self.horizon = horizon
        self.gradient = gradient
        self.prefill_gradient = prefill_gradient

    def room(self, running: Sequence[Load]) -> "PagedRoom":
        """See `Budget.room`."""
        return PagedRoom(self, running)

    def may_add(self, running: Sequence[Load], num_waiting: int, num_steps: int) -> bool:
        """Always: prompts are computed in chunks beside the running sequences."""
        return True

    def batch_tokens(self, lengths: Iterable[int]) -> int:
        """Nothing is padded."""
        return sum(lengths)

    def check_length(self, max_sequence_length: int) -> None:
        """See `Budget.check_length`."""
        length = max_sequence_length
        _check(self.limit, length * self.prefill_gradient, length * self.gradient, length)


class PagedRoom:
    """See `Room`."""

    def __init__(self, budget: PagedBudget, running: Sequence[Load]) -> None:
        self._budget = budget
        horizon = budget.horizon
        # Longest remaining first: (-remaining, tokens).
        self._loads = sorted((-min(remaining, horizon), tokens) for tokens, remaining in running)
        self._tokens = sum(tokens for _, tokens in self._loads)
        self._remaining = -sum(remaining for remaining, _ in self._loads)
        self._prefill_limit = budget.limit - int(self._tokens * budget.gradient)
        self._new_tokens = 0
        self._sums: list[int] = []  # tokens of the first 1, 2, ... loads
        self._peaks: list[float] = []  # highest weight from each load's end on, a newcomer's aside

    def fits(self, load: Load) -> Verdict:
        """See `Room.fits`."""
        budget = self._budget
        if self._prefill_limit <= 0:
            return Verdict.NO_ROOM
        tokens, remaining = load.tokens, min(load.remaining, budget.horizon)
        verdict = Verdict.FITS
        total = self._tokens + tokens + self._remaining + remaining
        if int(total * budget.gradient) > budget.limit:
            if int(self._peak(tokens, remaining) * budget.gradient) > budget.limit:
                return Verdict.NO_ROOM
            verdict = Verdict.FITS_EXACTLY
        if int((self._new_tokens + tokens) * budget.prefill_gradient) > self._prefill_limit:
            return Verdict.PREFILL_WEIGHT
        return verdict

    def add(self, load: Load) -> None:
        """See `Room.add`."""
        remaining = min(load.remaining, self._budget.horizon)
        insort(self._loads, (-remaining, load.tokens))
        self._tokens += load.tokens
        self._remaining += remaining
        self._new_tokens += load.tokens
        self._peaks = []

    def _peak(self, tokens: int, remaining: float) -> float:
        """Most tokens held at any end up to the newcomer's own."""
        if not self._loads:
            return tokens + remaining
        if not self._peaks:
            self._prepare()
        longer = bisect_left(self._loads, (-remaining, -1))  # loads that outlast it
        held = self._sums[longer - 1] if longer else 0
        own = held + tokens + (longer + 1) * remaining
        return max(own, tokens + self._peaks[longer]) if longer < len(self._peaks) else own

    def _prepare(self) -> None:
        """At the end of load i, loads 0..i are there, each `remaining` of i longer than now."""
        self._sums = list(accumulate(tokens for _, tokens in self._loads))
        weights = [
            held - (number + 2) * remaining
            for number, (held, (remaining, _)) in enumerate(
                zip(self._sums, self._loads, strict=True)
            )
        ]
        self._peaks = list(accumulate(reversed(weights), max))[::-1]


@dataclass(frozen=True, slots=True)
class PaddedModel:
    """Memory of padded batches of n sequences: prefill max(a·n·L, b·n·L + c·n·L²), then g·n·L.

    Attributes:
        limit: inf = memory is not limited.
        linear: a.
        quadratic: b, c.
        gradient: g.
    """

    limit: float = math.inf
    linear: float = 0.0
    quadratic: tuple[float, float] = (0.0, 0.0)
    gradient: float = 0.0

    @classmethod
    def tokens(cls, limit: int, max_sequence_length: int) -> "PaddedModel":
        """A model in tokens, whose prefill grows with the square of the length."""
        return cls(limit, quadratic=(0.0, 1.0 / max_sequence_length), gradient=1.0)

    @classmethod
    def manual(cls, max_sequence_length: int, max_batch_size: int, margin: int) -> "PaddedModel":
        """ESTIMATE_MEMORY=manual: as if a full batch of full length just fitted.

        Args:
            margin: percent kept back, once, but never so that one sequence would not fit.
        """
        whole = max_sequence_length * max_batch_size * (100 - margin) // 100
        return cls.tokens(max(whole, max_sequence_length), max_sequence_length)


class PaddedBudget:
    """All sequences of a batch are padded to the longest.

    Args:
        model: of the memory.
        max_prefill_padding: share of padding that new prompts together may have, 0 to 1.
        max_waiting_tokens: steps after which a single waiting sequence is enough to interrupt the
            running ones; before, it takes more the less time has passed.
    """

    def __init__(
        self, model: PaddedModel, *, max_prefill_padding: float = 0.2, max_waiting_tokens: int = 24
    ) -> None:
        self.model = model
        self.max_prefill_padding = max_prefill_padding
        self.max_waiting_tokens = max_waiting_tokens

    def room(self, running: Sequence[Load]) -> "PaddedRoom":
        """See `Budget.room`."""
        return PaddedRoom(self, running)

    def may_add(self, running: Sequence[Load], num_waiting: int, num_steps: int) -> bool:
        """As many must wait as TGIS requires, and the batch must not be about to end."""
        if not running:
            return True
        if max(load.remaining for load in running) < 2:
            return False
        patience = self.max_waiting_tokens
        if len(running) == 1 or num_steps >= patience:
            return True
        return num_waiting >= max(1, len(running) * (patience - num_steps) // patience)

    def batch_tokens(self, lengths: Iterable[int]) -> int:
        """The longest counts for all."""
        lengths = list(lengths)
        return max(lengths, default=0) * len(lengths)

    def check_length(self, max_sequence_length: int) -> None:
        """See `Budget.check_length`."""
        length, model = max_sequence_length, self.model
        _check(model.limit, self.prefill_weight(1, length), length * model.gradient, length)

    def prefill_weight(self, num_new: int, longest: int) -> int:
        """Weight of computing `num_new` prompts padded to `longest` tokens."""
        model = self.model
        whole = num_new * longest
        steep, steeper = model.quadratic
        return int(max(whole * model.linear, whole * steep + whole * longest * steeper))


class PaddedRoom:
    """See `Room`."""

    def __init__(self, budget: PaddedBudget, running: Sequence[Load]) -> None:
        self._budget = budget
        model = budget.model
        self._loads = sorted((-remaining, tokens) for tokens, remaining in running)
        self._longest = max((tokens for _, tokens in self._loads), default=0)
        weight = int(self._longest * len(self._loads) * model.gradient)
        self._prefill_limit = model.limit - weight
        self._new: list[int] = []

    def fits(self, load: Load) -> Verdict:
        """See `Room.fits`."""
        limit, gradient = self._budget.model.limit, self._budget.model.gradient
        if self._prefill_limit <= 0:
            return Verdict.NO_ROOM
        count = len(self._loads) + 1
        remaining = max(load.remaining, -self._loads[0][0] if self._loads else 0)
        longest = max(self._longest, load.tokens)
        verdict = Verdict.FITS
        if int((longest + remaining) * count * gradient) > limit:
            if int(self._peak(load) * gradient) > limit:
                return Verdict.NO_ROOM
            verdict = Verdict.FITS_EXACTLY
        new = [*self._new, load.tokens]
        if self._budget.prefill_weight(len(new), max(new)) > self._prefill_limit:
            return Verdict.PREFILL_WEIGHT
        padded = max(new) * len(new)
        if padded and (padded - sum(new)) / padded > self._budget.max_prefill_padding:
            return Verdict.PREFILL_PADDING
        return verdict

    def add(self, load: Load) -> None:
        """See `Room.add`."""
        insort(self._loads, (-load.remaining, load.tokens))
        self._longest = max(self._longest, load.tokens)
        self._new.append(load.tokens)

    def _peak(self, load: Load) -> int:
        """Most tokens, padding included, at any end up to the newcomer's own."""
        peak = longest = 0
        loads = sorted([*self._loads, (-load.remaining, load.tokens)])
        for count, (negative, tokens) in enumerate(loads, 1):
            longest = max(longest, tokens)
            if -negative <= load.remaining:
                peak = max(peak, (max(longest, load.tokens) - negative) * count)
        return peak
