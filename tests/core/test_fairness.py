"""Nobody waits for ever: adversaries that arrange arrivals so that somebody should.

Two facts are enough. Nobody who came more than `OVERTAKING_SECONDS` later is admitted before. And
the sequence admitted first is never preempted, so those ahead are worked off: one after the other
in the worst case.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tests.kit.scheduling import Driver, request

from tgis.core.scheduler import OVERTAKING_SECONDS
from tgis.engines.plan import StepPlan
from tgis.types import FinishReason
from tgis.wire import Add

TOKENS, SLOTS, BUDGET = 256, 8, 32
STEP_SECONDS = 0.1
STEPS = 200

Size = tuple[int, int]  # prompt, new tokens
Adversary = Callable[[int, random.Random], list[Size]]


def endless_small(step: int, rng: random.Random) -> list[Size]:
    """One that needs all the memory, then always enough small ones to leave it no room."""
    return [(240, 10)] if step == 3 else [(8, rng.randint(4, 20))] * 2


def just_in_time(step: int, rng: random.Random) -> list[Size]:
    """Small ones within the second in which they may pass, for every large one anew."""
    return [(200, 20)] if step % 10 == 0 else [(12, 30)]


def long_prompts(step: int, rng: random.Random) -> list[Size]:
    """Nothing but prompts of many chunks."""
    return [(150, 4)] if step % 2 == 0 else []


def greedy_growers(step: int, rng: random.Random) -> list[Size]:
    """Short prompts that grow until memory runs out and somebody is preempted."""
    return [(4, 120)] if step % 3 == 0 else []


def sawtooth(step: int, rng: random.Random) -> list[Size]:
    """Bursts of falling size, so that each next one seems easier to admit."""
    return [(size, 8) for size in range(120, 0, -20)] if step % 25 == 0 else []


def anything(step: int, rng: random.Random) -> list[Size]:
    """Random sizes from one token to all the memory."""
    if rng.random() < 0.5:
        return []
    prompt = rng.choice([1, 5, 20, 60, 200, 250])
    return [(prompt, rng.randint(1, TOKENS - prompt))]


ADVERSARIES = [endless_small, just_in_time, long_prompts, greedy_growers, sawtooth, anything]


@dataclass
class Game:
    """Plays an adversary and watches every request."""

    driver: Driver
    adds: dict[int, Add] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)  # step
    started: dict[int, int] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)

    def play(self, adversary: Adversary, seed: int) -> None:
        rng = random.Random(seed)
        step = 0
        while step < STEPS or self.driver.scheduler.has_work:
            for prompt, new in adversary(step, rng) if step < STEPS else []:
                self.arrive(step, prompt, new)
            self.driver.now = step * STEP_SECONDS
            before = dict.fromkeys(self.driver.live)
            self.watch(step, self.driver.step(), before)
            step += 1
            assert step < 100 * STEPS, "no end"

    def arrive(self, step: int, prompt: int, new: int) -> None:
        uid = len(self.adds)
        start = uid * 37 % 31  # prompts that now and then begin alike
        tokens = [(start + i) % 32 for i in range(prompt)]
        add = request(uid, max_new=new, prompt=tokens, arrival=step * STEP_SECONDS)
        self.adds[uid], self.arrived[uid] = add, step
        self.driver.add(add)

    def watch(self, step: int, plan: StepPlan, before: dict[int, None]) -> None:
        rows = {row.seq_id for row in plan.rows}
        for uid in rows - self.started.keys():
            self.started[uid] = step
            passed = [
                other
                for other in before.keys() - self.started.keys() - rows
                if self.adds[other].arrival + OVERTAKING_SECONDS < self.adds[uid].arrival
            ]
            assert not passed, f"{uid} passed {passed}, which came too long before"
        for uid in before.keys() - self.driver.live.keys():
            self.finished[uid] = step

    def work_ahead(self, uid: int) -> int:
        """Steps that the requests which may go first take one after the other."""
        latest = self.adds[uid].arrival + OVERTAKING_SECONDS
        return sum(
            -(-len(add.token_ids) // BUDGET) + add.max_new_tokens
            for other, add in self.adds.items()
            if add.arrival <= latest and other != uid and self.finished[other] >= self.arrived[uid]
        )


def games() -> Iterator[tuple[str, int]]:
    for adversary in ADVERSARIES:
        for seed in range(3 if adversary is anything else 1):
            yield adversary.__name__, seed


@pytest.mark.parametrize(("name", "seed"), list(games()))
@pytest.mark.parametrize("block_tokens", [0, 8])
@pytest.mark.parametrize("horizon", [0.0, 16.0, float("inf")])
def test_everybody_starts_once_those_before_are_through(
    name: str, seed: int, block_tokens: int, horizon: float
) -> None:
    driver = Driver.make(SLOTS, TOKENS, BUDGET, block_tokens=block_tokens, horizon=horizon)
    driver.checked = False  # of tokens; other tests do that
    game = Game(driver)
    game.play(globals()[name], seed)
    assert set(driver.done) == set(game.adds)
    for uid, (tokens, reason) in driver.done.items():
        assert reason is FinishReason.MAX_TOKENS
        assert len(tokens) == game.adds[uid].max_new_tokens
    for uid, started in game.started.items():
        assert started - game.arrived[uid] <= game.work_ahead(uid) + 1


def test_a_decoding_stream_gets_a_token_in_every_step_whatever_comes() -> None:
    """At least every second chunk is promised; memory is ample, so it is every one."""
    driver = Driver.make(SLOTS, 4000, BUDGET)
    driver.add(request(10**6, max_new=300))
    driver.step()
    rng = random.Random(0)
    for step in range(299):
        if len(driver.live) < SLOTS:
            driver.add(request(step, prompt_len=rng.choice([3, 90, 400]), max_new=4))
        generated = {s.uid: s.num_generated for s in driver.live.values() if s.num_generated}
        driver.step()
        for uid, before in generated.items():
            assert uid in driver.done or driver.live[uid].num_generated == before + 1


def test_a_preempted_sequence_does_not_thrash() -> None:
    """Each preemption is paid for by at least as many tokens as admission looks ahead."""
    horizon = 16
    driver = Driver.make(SLOTS, TOKENS, BUDGET, horizon=horizon)
    for uid in range(SLOTS):
        driver.add(request(uid, prompt_len=4, max_new=200, arrival=uid / 10))
    driver.run()
    generated = sum(len(tokens) for tokens, _ in driver.done.values())
    assert driver.scheduler.drain_counts().num_preempted <= generated / horizon
