"""The scheduler driven without a loop: a fake cache in the part of engine and sampler."""

import math
from dataclasses import dataclass, field

from tests.kit.fake_engine import FakeCache, continuation

from tgis.core.budget import PagedBudget
from tgis.core.kv.base import KvMemory
from tgis.core.kv.blocks import BlocksMemory
from tgis.core.kv.rows import RowsMemory
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import Sequence
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan
from tgis.types import NO_DETAILS, DetailParams, FinishReason, SamplingParams
from tgis.wire import Add


def request(
    seq_id: int,
    prompt_len: int = 4,
    max_new: int = 5,
    *,
    arrival: float = 0.0,
    deadline: float = math.inf,
    min_new: int = 0,
    details: DetailParams = NO_DETAILS,
    prompt: list[int] | None = None,
) -> Add:
    """A request with a prompt of its own, unless it is given one."""
    if prompt is None:
        prompt = [(7 * seq_id + i) % 29 for i in range(prompt_len)]
    sampling = SamplingParams(min_new_tokens=min_new)
    return Add(seq_id, prompt, sampling, details, max_new, deadline, arrival)


@dataclass
class Driver:
    """Checks after every step that the accounts add up and that every token is the right one."""

    memory: KvMemory
    scheduler: Scheduler
    cache: FakeCache
    budget: int
    now: float = 0.0
    live: dict[int, Sequence] = field(default_factory=dict)
    done: dict[int, tuple[list[int], FinishReason]] = field(default_factory=dict)
    checked: bool = True

    @classmethod
    def make(
        cls,
        slots: int = 4,
        tokens: int = 1000,
        budget: int = 16,
        eos: int = -1,
        *,
        block_tokens: int = 0,
        granule: int = 1,
        caching: bool = True,
        horizon: float = 16,
        mixed: int | None = None,
        mixed_step: int | None = None,
    ) -> "Driver":
        """Rows, or blocks of `block_tokens`."""
        memory: KvMemory
        if block_tokens:
            num_blocks = tokens // block_tokens
            memory = BlocksMemory(slots, num_blocks, block_tokens, caching=caching)
            shape = CacheShape(num_blocks, block_tokens)
        else:
            memory = RowsMemory(2 * slots, tokens, granule=granule, caching=caching)
            shape = CacheShape(2 * slots, tokens)
        scheduler = Scheduler(
            memory,
            PagedBudget(memory.total, horizon=horizon),
            max_step_tokens=budget,
            max_mixed_tokens=mixed,
            mixed_step_tokens=mixed_step,
            max_running=slots,
            eos_token_ids=[eos],
        )
        return cls(memory, scheduler, FakeCache(shape, block_tokens), budget)

    def add(self, add: Add, salt: bytes = b"") -> Sequence:
        """Queue a request."""
        seq = self.live[add.seq_id] = Sequence.of(add.seq_id, add, 0)
        seq.salt = salt or seq.salt
        self.scheduler.add(seq)
        return seq

    def drop(self, seq_id: int, keep: bool = True) -> None:
        """Cancel, or with keep=False fail, a live request."""
        self.scheduler.remove(self.live.pop(seq_id), keep)
        self.check()

    def expire(self) -> None:
        """Forget what the scheduler says has expired."""
        for seq in self.scheduler.expire(self.now):
            del self.live[seq.uid]

    def step(self) -> StepPlan:
        """One step."""
        self.now += 1
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.budget
        for seq_id in self.live.keys() & {row.seq_id for row in plan.rows}:
            self.live[seq_id].started = True
        self.cache.release(self.scheduler.drain_released())
        for row, follow in zip(plan.rows, self.cache.compute(plan), strict=True):
            self.account(row, follow[-1])
        self.check()
        return plan

    def fail(self) -> None:
        """A step that raises after it has written: all its rows fail."""
        plan = self.scheduler.schedule()
        self.cache.release(self.scheduler.drain_released())
        self.cache.compute(plan)
        for row in plan.rows:
            self.scheduler.remove(self.live.pop(row.seq_id), keep=False)
        self.check()

    def account(self, row: Row, token_id: int) -> None:
        """What the loop does with a row that has been computed."""
        seq = self.live[row.seq_id]
        assert row.start == seq.num_computed
        assert row.token_ids == seq.token_ids[row.start : row.start + len(row.token_ids)]
        self.scheduler.account(seq, row)
        if seq.num_uncomputed:
            return
        if self.checked:
            right = continuation(seq.request.token_ids, seq.num_generated + 1)
            assert token_id == right[-1], f"sequence {seq.uid} read what is not its own"
        reason = self.scheduler.append(seq, token_id, self.now)
        if reason is not FinishReason.NOT_FINISHED:
            self.done[row.seq_id] = (seq.token_ids[seq.num_prompt :], reason)
            del self.live[row.seq_id]

    def check(self) -> None:
        """The accounts."""
        assert self.scheduler.check() is None
        holding = [seq for seq in self.live.values() if seq.slot >= 0]
        assert len(holding) == self.scheduler.num_running
        assert len(self.live) - len(holding) == self.scheduler.num_waiting

    def run(self, limit: int = 10_000) -> None:
        """Step until there is no work."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                assert self.memory.used == 0
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")
