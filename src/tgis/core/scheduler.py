"""Which tokens the next step computes. Pure Python: no tensors, no clock, no I/O.

A step has a budget of tokens. Sequences that only wait for their next token always get it; chunks
of prompts share what is left, oldest first. So a decoding stream never waits for a prompt, and a
prompt never waits for the end of a stream.

Memory for a prompt is reserved whole when it is admitted. Generated tokens reserve as they come;
when memory runs out, the sequence admitted last gives its memory up and is computed again later
(preemption by recomputation).
"""

from collections import deque
from collections.abc import Iterable

from tgis.core.kv.base import KvMemory
from tgis.core.sequence import Sequence
from tgis.engines.plan import Row, StepPlan, Want
from tgis.types import FinishReason
from tgis.wire import Gauges

# A request that does not fit may be passed only by requests that came less than this later.
OVERTAKING_SECONDS = 1.0
# Room that each running sequence keeps to grow in before another one is admitted.
HEADROOM_TOKENS = 16


class Scheduler:
    """Waiting and running sequences, and the token budget.

    Args:
        memory: accounts of key/value memory.
        max_step_tokens: new tokens that one step computes at most.
        max_running: sequences that hold memory at the same time at most.
        eos_token_ids: any of them ends a sequence.
    """

    def __init__(
        self,
        memory: KvMemory,
        *,
        max_step_tokens: int,
        max_running: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        if max_step_tokens <= max_running:
            raise ValueError(f"max_step_tokens {max_step_tokens} <= max_running {max_running}")
        self._memory = memory
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._eos = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence in whatever state and take its memory back."""
        if seq.slot >= 0:
            self.running.remove(seq)
            self._memory.close(seq)
        else:
            self.waiting.remove(seq)

    def expire(self, now: float) -> list[Sequence]:
        """Remove and return the waiting sequences whose deadline has passed."""
        expired = [seq for seq in self.waiting if now > seq.request.deadline]
        for seq in expired:
            self.waiting.remove(seq)
        return expired

    def schedule(self) -> StepPlan:
        """Plan the next step and reserve the memory that it needs."""
        rows: list[Row] = []
        budget = self._max_step_tokens
        num_preempted = self.num_preempted
        for seq in tuple(self.running):
            if seq.slot >= 0 and seq.num_uncomputed == 1 and self._grow(seq):
                rows.append(_row(seq, 1))
                budget -= 1
        for seq in self.running:
            if budget and seq.num_uncomputed > 1:
                budget -= self._chunk(seq, budget, rows)
        if num_preempted == self.num_preempted:
            self._admit(budget, rows)
        return StepPlan(rows, self._memory.drain_copies())

    def account(self, seq: Sequence, row: Row) -> None:
        """Note that `row` has been computed."""
        seq.num_computed += len(row.token_ids)

    def append(self, seq: Sequence, token_id: int, now: float) -> FinishReason:
        """Add a chosen token; a sequence that ends thereby is removed."""
        seq.token_ids.append(token_id)
        reason = self._finish_reason(seq, token_id, now)
        if reason is not FinishReason.NOT_FINISHED:
            self.remove(seq)
        return reason

    def drain_released(self) -> list[int]:
        """Slots whose memory may go back to the operating system."""
        return self._memory.drain_released()

    def gauges(self) -> Gauges:
        """The state of queue, batch and memory."""
        return Gauges(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            running_tokens=sum(len(seq.token_ids) for seq in self.running),
            remaining_tokens=sum(seq.num_remaining for seq in self.running),
            kv_tokens_used=self._memory.used,
            kv_tokens_total=self._memory.total,
        )

    def _finish_reason(self, seq: Sequence, token_id: int, now: float) -> FinishReason:
        """The order of the rules is that of the TGIS api (stopping)."""
        if now > seq.request.deadline:
            return FinishReason.TIME_LIMIT
        if seq.num_generated < seq.request.sampling.min_new_tokens:
            return FinishReason.NOT_FINISHED
        if token_id in self._eos:
            return FinishReason.EOS_TOKEN
        if seq.num_remaining <= 0:
            return FinishReason.MAX_TOKENS
        return FinishReason.NOT_FINISHED

    def _grow(self, seq: Sequence) -> bool:
        """Reserve the next token of `seq`, at the cost of sequences admitted after it."""
        while not self._memory.reserve(seq, len(seq.token_ids)):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._memory.close(seq)
        self.waiting.appendleft(seq)
        self.num_preempted += 1

    def _chunk(self, seq: Sequence, budget: int, rows: list[Row]) -> int:
        num_tokens = min(seq.num_uncomputed, budget)
        rows.append(_row(seq, num_tokens))
        return num_tokens

    def _admit(self, budget: int, rows: list[Row]) -> None:
        """Let waiting sequences in, in order; small ones may pass one that does not fit, but only
        for a while, so that nothing waits for ever.
        """
        cutoff = float("inf")
        for seq in tuple(self.waiting):
            if not budget or len(self.running) >= self._max_running or seq.request.arrival > cutoff:
                return
            if self._enter(seq):
                budget -= self._chunk(seq, budget, rows)
            else:
                cutoff = min(cutoff, seq.request.arrival + OVERTAKING_SECONDS)

    def _enter(self, seq: Sequence) -> bool:
        headroom = HEADROOM_TOKENS * len(self.running)
        if len(seq.token_ids) + headroom > self._memory.free + self._memory.cached:
            return False
        if not self._memory.open(seq):
            return False
        if not self._memory.reserve(seq, len(seq.token_ids)):
            self._memory.close(seq)
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        return True


def _row(seq: Sequence, num_tokens: int) -> Row:
    start = seq.num_computed
    end = start + num_tokens
    if seq.wants_input_details:
        want = Want.ALL
    elif end == len(seq.token_ids):
        want = Want.LAST
    else:
        want = Want.NOTHING
    return Row(seq.uid, seq.slot, seq.token_ids[start:end], start, want)
