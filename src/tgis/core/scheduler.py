"""Which tokens the next step computes. Pure Python: no tensors, no clock, no I/O.

A step has a budget of tokens. Sequences that only wait for their next token always get it; chunks
of prompts share what is left, oldest first. So a decoding stream never waits for a prompt, and a
prompt never waits for the end of a stream.

Memory for a prompt is reserved whole when it is admitted. Generated tokens reserve as they come;
when memory runs out, the sequence admitted last gives its memory up and is computed again later
(preemption by recomputation). The one admitted first never does, so there is always progress.
"""

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

from tgis.core.budget import Budget, Load, Room, Verdict
from tgis.core.kv.base import KvMemory
from tgis.core.sequence import Sequence
from tgis.core.waiting import Waiting
from tgis.engines.plan import Row, StepPlan, Want
from tgis.types import FinishReason
from tgis.wire import Gauges, SchedulerCounts

# A request that does not fit may be passed only by requests that came less than this later ...
OVERTAKING_SECONDS = 1.0
# ... and a step looks at so many that do not fit at most.
_MOST_SKIPPED = 32
_MOST_PAST_DEADLINES = 64  # of sequences that have ended, beside as many as have not


class Scheduler:
    """Waiting and running sequences, and the token budget.

    Args:
        memory: accounts of key/value memory.
        budget: says whether a waiting sequence may join the running ones.
        max_step_tokens: new tokens that one step computes at most. An engine that cannot compute a
            prompt in chunks needs so many that none is ever cut.
        max_mixed_tokens: new tokens of prompts that a step computes at most beside sequences that
            wait for their next token; None = what those leave of `mixed_step_tokens`, and at least
            half of it.
        mixed_step_tokens: None = `max_step_tokens`.
        max_running: sequences that hold memory at the same time at most.
        eos_token_ids: any of them ends a sequence.
    """

    def __init__(
        self,
        memory: KvMemory,
        budget: Budget,
        *,
        max_step_tokens: int,
        max_mixed_tokens: int | None = None,
        mixed_step_tokens: int | None = None,
        max_running: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        if max_step_tokens <= max_running:
            raise ValueError(f"max_step_tokens {max_step_tokens} <= max_running {max_running}")
        self._memory = memory
        self._budget = budget
        self._max_step_tokens = max_step_tokens
        self._max_mixed_tokens = max_mixed_tokens
        self._mixed_step_tokens = mixed_step_tokens or max_step_tokens
        self._max_running = max_running
        self._eos = frozenset(eos_token_ids)
        self._waiting = Waiting()
        self._running: dict[int, Sequence] = {}  # by uid, in order of admission
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline, uid)
        self._steps_alone = 0  # since a sequence was admitted last
        self._counts = SchedulerCounts()
        self._no_room = False  # for anybody who waits, until one comes or one leaves
        self._new: set[int] = set()  # added since the last step was planned

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no memory."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold memory."""
        return len(self._running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.arrive(seq)
        self._no_room = False
        self._new.add(seq.uid)
        self._note_deadline(seq)

    def remove(self, seq: Sequence, keep: bool = True) -> None:
        """Forget a sequence in whatever state and take its memory back.

        Args:
            keep: what was computed of it is sound, and may serve others as a cached prefix.
        """
        if seq.slot >= 0:
            del self._running[seq.uid]
            self._memory.close(seq, keep)
            self._no_room = False
        else:
            self._waiting.take(seq)
        self._waiting.leave(seq)
        if not self.has_work:
            self._deadlines.clear()

    def expire(self, now: float) -> list[Sequence]:
        """Remove and return the sequences whose deadline has passed and that get no token soon.

        Those that wait for their next token only get it, and end with it. New ones get their chance
        in the next step, so that an idle server gives even the smallest time limit a token.
        """
        expired = []
        spared = []
        while self._deadlines and self._deadlines[0][0] < now:
            deadline, uid = heappop(self._deadlines)
            if uid in self._new:
                spared.append((deadline, uid))
                continue
            seq = self._find(uid)
            if seq is not None and (seq.slot < 0 or seq.num_uncomputed > 1 or seq.held):
                self.remove(seq)
                expired.append(seq)
        for item in spared:
            heappush(self._deadlines, item)
        return expired

    def schedule(self) -> StepPlan:
        """Plan the next step and reserve the memory that it needs."""
        rows: list[Row] = []
        prompts: list[Sequence] = []
        num_preempted = self._counts.num_preempted
        for seq in tuple(self._running.values()):
            if seq.held:
                continue
            length = len(seq.token_ids)
            if length - seq.num_computed > 1:
                prompts.append(seq)
            elif seq.slot >= 0 and (seq.size <= seq.room or self._grow(seq)):
                last = seq.token_ids[-1]
                row = Row(seq.uid, seq.slot, [last], length - 1, Want.LAST, seq.block_table)
                row.prompt, row.lora = seq.prompt, seq.lora
                rows.append(row)
        budget = self._max_step_tokens - len(rows)
        if rows:
            budget = min(budget, self._beside(len(rows)))
        for seq in prompts:
            if budget and seq.slot >= 0:
                budget -= _add_chunk(seq, budget, rows)
        self._new.clear()
        self._steps_alone += 1
        if budget and self._may_admit() and num_preempted == self._counts.num_preempted:
            self._admit(budget, rows)
        return StepPlan(rows, self._memory.drain_copies())

    def account(self, seq: Sequence, row: Row) -> None:
        """Note that `row` has been computed; of its drafts nothing is known yet."""
        seq.num_computed += len(row.token_ids) - row.num_drafts
        if row.start < seq.num_prompt:
            self._memory.commit(seq)

    def room_for_drafts(self, seq: Sequence, plan: StepPlan, num_tokens: int) -> int:
        """How many drafts a row of `plan` may compute behind the tokens of `seq`, of so many.

        Their memory is reserved, at no running sequence's cost; prompts come first in a step.
        """
        num_tokens = min(num_tokens, self._max_step_tokens - plan.num_tokens, seq.num_remaining - 1)
        if num_tokens > 0 and seq.size + num_tokens > seq.room:
            self._memory.reserve(seq, seq.size + num_tokens)
        num_tokens = max(0, min(num_tokens, seq.room - seq.size))
        seq.num_written = max(seq.num_written, seq.size + num_tokens)
        return num_tokens

    def accept(self, seq: Sequence) -> None:
        """Note that the token appended last had been drafted, and computed with its row."""
        seq.num_computed += 1

    def append(self, seq: Sequence, token_id: int, now: float) -> FinishReason:
        """Add a chosen token; a sequence that ends thereby is removed."""
        seq.token_ids.append(token_id)
        self._waiting.serve(seq, 1)
        reason = self._finish_reason(seq, token_id, now)
        if reason is not FinishReason.NOT_FINISHED:
            self.remove(seq)
        return reason

    def drain_released(self) -> list[int]:
        """Slots whose memory must go back to the operating system before the next step."""
        return self._memory.drain_released()

    def drain_counts(self) -> SchedulerCounts:
        """What has been counted since the last call."""
        counts, self._counts = self._counts, SchedulerCounts()
        return counts

    def batch_tokens(self, rows: Iterable[Row]) -> int:
        """New tokens of these rows, with padding if the engine pads."""
        return self._budget.batch_tokens(row.num_tokens for row in rows)

    def gauges(self) -> Gauges:
        """The state of queue, batch and memory."""
        running = self._running.values()
        return Gauges(
            num_waiting=len(self._waiting),
            num_running=len(running),
            running_tokens=self._budget.batch_tokens(seq.size for seq in running),
            remaining_tokens=max((seq.num_remaining for seq in running), default=0),
            kv_tokens_used=self._memory.used,
            kv_tokens_total=self._memory.total,
        )

    def check(self) -> str | None:
        """What is wrong with the accounts, if anything."""
        memory = self._memory
        if memory.used + memory.cached + memory.free != memory.total:
            return f"{memory.used} used + {memory.cached} cached + {memory.free} free tokens"
        if not self._running and memory.used:
            return f"{memory.used} tokens used by nobody"
        return memory.check()

    def _beside(self, num_rows: int) -> int:
        """New tokens of prompts beside so many sequences that wait for their next token."""
        if self._max_mixed_tokens is not None:
            return self._max_mixed_tokens
        return max(self._mixed_step_tokens - num_rows, self._mixed_step_tokens // 2)

    def _may_admit(self) -> bool:
        return bool(self._waiting) and len(self._running) < self._max_running and not self._no_room

    def _note_deadline(self, seq: Sequence) -> None:
        if seq.deadline == float("inf"):
            return
        heappush(self._deadlines, (seq.deadline, seq.uid))
        num_live = self.num_waiting + self.num_running
        if len(self._deadlines) > 2 * num_live + _MOST_PAST_DEADLINES:
            live = {item for item in self._deadlines if self._find(item[1]) is not None}
            self._deadlines = list(live)
            heapify(self._deadlines)

    def _find(self, uid: int) -> Sequence | None:
        return self._waiting.get(uid) or self._running.get(uid)

    def _finish_reason(self, seq: Sequence, token_id: int, now: float) -> FinishReason:
        """The order of the rules is that of the TGIS api (stopping)."""
        length = len(seq.token_ids)
        if now > seq.deadline:
            return FinishReason.TIME_LIMIT
        if length < seq.min_length:
            return FinishReason.NOT_FINISHED
        if token_id in self._eos:
            return FinishReason.EOS_TOKEN
        if length >= seq.max_length:
            return FinishReason.MAX_TOKENS
        return FinishReason.NOT_FINISHED

    def _grow(self, seq: Sequence) -> bool:
        """Reserve the next token of `seq`, at the cost of sequences admitted after it."""
        while not self._memory.reserve(seq, seq.size):
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        del self._running[seq.uid]
        self._memory.close(seq)
        self._waiting.put_back(seq)
        self._note_deadline(seq)
        self._counts.num_preempted += 1

    def _admit(self, budget: int, rows: list[Row]) -> None:
        """Let waiting sequences in, in order; small ones may pass one that does not fit, but only
        for a while, so that nothing waits for ever.
        """
        running = [_load(seq) for seq in self._running.values()]
        if not self._budget.may_add(running, len(self._waiting), self._steps_alone):
            return
        admitted: list[Sequence] = []
        for seq in self._fitting(self._budget.room(running)):
            admitted.append(seq)
            budget -= _add_chunk(seq, budget, rows)
            if not budget or len(running) + len(admitted) >= self._max_running:
                break
        for seq in admitted:
            self._waiting.take(seq)
            self._running[seq.uid] = seq
            self._steps_alone = 0
        self._no_room = not admitted

    def _fitting(self, room: Room) -> Iterator[Sequence]:
        """Waiting sequences for which there is room; each has its memory when it is yielded."""
        counts = self._counts
        cutoff, num_skipped = float("inf"), 0
        for seq in self._waiting:
            if seq.arrival > cutoff:
                return
            load = _load(seq)
            verdict = room.fits(load)
            if verdict.fits and self._memory.open(seq, seq.size):
                room.add(load)
                self._waiting.serve(seq, seq.num_uncomputed)
                counts.num_queue_jumps += num_skipped > 0
                counts.num_exact_fits += verdict is Verdict.FITS_EXACTLY
                if self._memory.caching and not seq.started:
                    counts.prefix_query_tokens += len(seq.token_ids)
                    counts.prefix_hit_tokens += seq.num_computed
                yield seq
                continue
            counts.num_weight_skips += verdict is Verdict.PREFILL_WEIGHT
            counts.num_padding_skips += verdict is Verdict.PREFILL_PADDING
            cutoff = min(cutoff, seq.arrival + OVERTAKING_SECONDS)
            num_skipped += 1
            if num_skipped >= _MOST_SKIPPED:
                return


def _load(seq: Sequence) -> Load:
    return Load(max(seq.size, seq.room), seq.num_remaining)


def _add_chunk(seq: Sequence, budget: int, rows: list[Row]) -> int:
    """Add a row of at most `budget` uncomputed tokens; returns how much of the budget it takes.

    What an encoder reads comes with the first tokens, and whole.
    """
    start, length = seq.num_computed, len(seq.token_ids)
    end = min(length, start + budget)
    want = Want.LAST if end == length else Want.NOTHING
    if seq.wants_input_details:
        want = Want.ALL
    row = Row(seq.uid, seq.slot, seq.token_ids[start:end], start, want, seq.block_table)
    row.prompt, row.lora = seq.prompt, seq.lora
    if start == 0 and seq.encoder_ids:
        row.encoder_ids = seq.encoder_ids
    rows.append(row)
    return min(budget, row.num_tokens)
