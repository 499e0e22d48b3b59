"""Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192): which rows get how many drafts.

A step that computes a row's last token and, behind it, a few tokens that only may follow takes
hardly longer than one without them. The sampler then chooses after each as ever; as far as it
chooses what was drafted, the row advances several tokens in one step. Outputs do not change,
whatever is drafted.

Time lost to wrong drafts is kept within bounds: per sequence, drafts are on account. An attempt
costs what it makes the step longer, and earns the tokens it saves; who is in debt pays it off by a
small share of each token, and tries again when that is done.
"""

from collections.abc import Mapping

from tgis.core.drafts import Drafter
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import Sequence
from tgis.core.step_costs import StepCosts
from tgis.engines.plan import StepPlan, Want
from tgis.wire import DraftCounts

REPAYMENT = 0.02  # of each token's time: what drafts that are always wrong cost at most
_CREDIT = 32.0  # tokens' time that one who has earned as much may lose again
_OVERHEAD = 0.1  # of a step, if there are drafts in it at all: more than steps in isolation show
_FIRST, _LEAST = 4, 2  # drafts of the first attempt, and after failures


class Turn:
    """A sequence whose next token can be chosen now, and those after it if its drafts are right.

    Attributes:
        pick: the row of logits after its last token; those after its drafts follow.
        accepted: drafts that turned out to be what is chosen.
    """

    __slots__ = ("accepted", "drafts", "pick", "seq")

    def __init__(self, seq: Sequence, pick: int, drafts: list[int]) -> None:
        self.seq = seq
        self.pick = pick
        self.drafts = drafts
        self.accepted = 0

    def accepts(self, token_id: int) -> bool:
        """Whether a chosen token is what was drafted; then the one after it can be chosen too."""
        if self.accepted == len(self.drafts) or self.drafts[self.accepted] != token_id:
            return False
        self.accepted += 1
        self.pick += 1
        return True


class Account:
    """How drafts have served one sequence; amounts are in tokens' time."""

    __slots__ = ("_debt", "_length", "_most", "_num_seen")

    def __init__(self, most: int, num_generated: int) -> None:
        self._most = most
        self._length = min(_FIRST, most)
        self._debt = 0.0
        self._num_seen = num_generated

    def length(self, num_generated: int) -> int:
        """How many drafts it may have now; 0 = none."""
        if self._debt > 0:
            self._debt = max(self._debt - REPAYMENT * (num_generated - self._num_seen), 0.0)
        self._num_seen = num_generated
        return self._length if self._debt <= 0 else 0

    def note(self, num_drafted: int, num_accepted: int, cost: float) -> None:
        """An attempt has ended. What is right gets longer, what is wrong gets shorter."""
        self._debt = max(self._debt + cost - num_accepted, -_CREDIT)
        if num_accepted == num_drafted:
            self._length = min(max(self._length, 2 * num_drafted), self._most)
        else:
            self._length = min(max(num_accepted + 1, _LEAST), self._most)


class _Price:
    """What drafts cost in a step, in tokens: all rows that it advances wait for them."""

    def __init__(
        self, costs: StepCosts, drafter: Drafter, plan: StepPlan, num_waiting: int, num_asking: int
    ) -> None:
        self._costs = costs
        self._drafter = drafter
        self._plan = plan
        self._waiting = num_waiting
        self._share = 1 / max(num_asking, 1)  # drafts are made for all at once
        self._base = costs.of(plan.num_tokens)

    def of(self, num_drafts: int) -> float:
        """So many more in the plan as it is now."""
        now = self._plan.num_tokens
        longer = self._costs.of(now + num_drafts) - self._costs.of(now)
        seconds = longer + self._share * self._drafter.seconds(num_drafts)
        relative = seconds / self._base if self._base else 0.0
        return self._waiting * (relative + self._share * _OVERHEAD)


class Speculation:
    """Adds drafts to the rows of a step, and learns from what becomes of them.

    Args:
        drafter: where drafts come from; None = there are none.
        costs: of steps.
        most_tokens: of one draft.
        most_rows: of a step that gets drafts.
        most_step_tokens: of such a step; larger ones may be computed by other kernels, which round
            differently.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        costs: StepCosts,
        most_tokens: int,
        most_rows: int,
        most_step_tokens: int,
    ) -> None:
        self._drafter = drafter
        self._costs = costs
        self._most_tokens = most_tokens
        self._most_rows = most_rows
        self._most_step_tokens = most_step_tokens
        self._accounts: dict[int, Account] = {}  # by uid
        self._costs_now: dict[int, float] = {}  # by uid: of the drafts under way
        self._counts = DraftCounts()

    def extend(self, plan: StepPlan, sequences: Mapping[int, Sequence], room: Scheduler) -> None:
        """Add drafts to the rows of a plan that wait for their next token only."""
        self._settle_failed()
        if self._drafter is None or len(plan.rows) > self._most_rows:
            return
        if plan.num_tokens >= self._most_step_tokens:
            return
        waiting = [row for row in plan.rows if len(row.token_ids) == 1 and row.want is Want.LAST]
        asking = [
            (row, seq, length)
            for row in waiting
            if (length := self._length(seq := sequences[row.seq_id]))
        ]
        price = _Price(self._costs, self._drafter, plan, len(waiting), len(asking))
        asking = [(row, seq, n) for row, seq, n in asking if price.of(n) < n]
        if not asking:
            return
        drafts = self._drafter.draft([(seq, length) for _, seq, length in asking])
        price = _Price(self._costs, self._drafter, plan, len(waiting), sum(map(bool, drafts)))
        for (row, seq, _), draft in zip(asking, drafts, strict=True):
            del draft[max(0, self._most_step_tokens - plan.num_tokens) :]
            del draft[room.room_for_drafts(seq, plan, len(draft)) :]
            if draft:
                self._costs_now[seq.uid] = price.of(len(draft))
                row.token_ids += draft
                row.num_drafts, row.want = len(draft), Want.ALL

    def note(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Take in how many of a row's drafts were chosen; the sequence may have ended."""
        self._counts.num_drafts += 1
        self._counts.num_drafted += num_drafted
        self._counts.num_accepted += num_accepted
        if (account := self._accounts.get(seq.uid)) is not None:
            account.note(num_drafted, num_accepted, self._costs_now.pop(seq.uid, 0.0))

    def forget(self, uid: int) -> None:
        """This sequence has ended."""
        if self._accounts.pop(uid, None) is not None and self._drafter is not None:
            self._drafter.forget(uid)

    def drain_counts(self) -> DraftCounts:
        """What has been counted since the last call."""
        counts, self._counts = self._counts, DraftCounts()
        return counts

    def _settle_failed(self) -> None:
        """Drafts of which nothing was heard have cost a step that failed, besides."""
        for uid, cost in self._costs_now.items():
            if (account := self._accounts.get(uid)) is not None:
                account.note(1, 0, 1.0 + cost)
        self._costs_now.clear()

    def _length(self, seq: Sequence) -> int:
        """How many drafts a sequence may have now."""
        if not seq.num_generated or seq.sampled_alone:
            return 0
        account = self._accounts.get(seq.uid)
        if account is None:
            account = Account(self._most_tokens, seq.num_generated)
            self._accounts[seq.uid] = account
        return max(0, min(account.length(seq.num_generated), seq.num_remaining - 1))


NO_SPECULATION = Speculation(None, StepCosts([1], [0.0]), 0, 0, 0)
