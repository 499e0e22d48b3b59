"""The core loop on a real socket, with the fake engine and the real sampler."""

import math
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.kit.core_house import SLOTS, House, open_house
from tests.kit.fake_engine import VOCAB, continuation

from tgis.core import loop
from tgis.engines.plan import StepPlan
from tgis.sampling import Choice
from tgis.types import NO_DETAILS, DetailParams, FinishReason, SamplingParams
from tgis.wire import Abort, Add, FailureKind, Hold, Loading


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path) as house:
        yield house


def add(
    seq_id: int,
    prompt: list[int],
    max_new: int = 4,
    details: DetailParams = NO_DETAILS,
    deadline: float = math.inf,
) -> Add:
    return Add(seq_id, prompt, SamplingParams(), details, max_new, deadline, 0.0)


def test_sequences_of_two_fronts_with_the_same_ids(house: House) -> None:
    fronts = [house.connect(), house.connect()]
    for number, front in enumerate(fronts):
        for seq_id in range(6):
            front.send(add(seq_id, [number + 1, seq_id]))
    house.turn(3)
    house.run(*fronts)
    for number, front in enumerate(fronts):
        assert set(front.finish.values()) == {FinishReason.MAX_TOKENS}
        for seq_id in range(6):
            assert front.tokens[seq_id] == continuation([number + 1, seq_id], 4)


def test_the_greeting_reaches_early_and_late_fronts(house: House) -> None:
    early = house.connect()
    house.turn()
    house.link.greet(Loading(1, 2))
    late = house.connect()
    house.turn()
    for front in (early, late):
        front.sock.settimeout(5)
        (message,) = front._decoder.feed(front.sock.recv(1000))
        assert message == Loading(1, 2)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 6])
def test_abort_in_every_state(house: House, turns: int) -> None:
    front = house.connect()
    front.send(add(1, list(range(20)), max_new=3))
    front.send(add(2, [5, 6], max_new=9))
    house.turn(1 + turns)
    front.send(Abort([1, 99]))
    house.run(front)
    assert front.tokens[2] == continuation([5, 6], 9)
    assert front.finish[2] is FinishReason.MAX_TOKENS
    assert (1 in front.finish) == (turns >= 4)


def test_a_front_that_vanishes_takes_its_sequences_along(house: House) -> None:
    gone, stays = house.connect(), house.connect()
    gone.send(add(1, [1, 2], max_new=40))
    stays.send(add(1, [3, 4], max_new=8))
    house.turn(3)
    gone.sock.close()
    house.turn(2)
    assert house.scheduler.gauges().num_running == 1
    house.run(stays)
    assert stays.tokens[1] == continuation([3, 4], 8)


def test_input_details_are_complete_over_chunks_and_come_with_the_first_token(
    house: House,
) -> None:
    prompt = [(5 * i) % VOCAB for i in range(50)]
    front = house.connect()
    front.send(add(1, prompt, 2, DetailParams(logprobs=True, ranks=True, input=True)))
    house.turn(2)
    house.run(front)
    (inputs,) = [item for out in front.outs for item in out.inputs]
    assert len(inputs.details) == 49
    first = next(out for out in front.outs if out.tokens)
    assert first.inputs == [inputs]
    follows = [continuation(prompt[: i + 1], 1)[0] for i in range(49)]
    for token, follow, details in zip(prompt[1:], follows, inputs.details, strict=True):
        assert (details.rank == 1) == (token == follow)


def test_deadline_while_waiting_ends_without_a_token(house: House) -> None:
    front = house.connect()
    for seq_id in range(SLOTS):
        front.send(add(seq_id, [seq_id], max_new=20))
    front.send(add(9, [1], deadline=3.5))
    house.turn(2)
    house.run(front)
    assert front.finish[9] is FinishReason.TIME_LIMIT
    assert 9 not in front.tokens


def test_the_smallest_time_limit_still_gives_a_token_on_an_idle_server(house: House) -> None:
    front = house.connect()
    house.turn()
    house.now[0] = 100.0
    front.send(add(1, [5], max_new=20, deadline=1.0))
    house.run(front)
    assert front.finish[1] is FinishReason.TIME_LIMIT
    assert front.tokens[1] == continuation([5], 1)


def fail_at(step: int, error: Exception) -> Callable[[StepPlan], None]:
    count = iter(range(1_000_000))

    def before(plan: StepPlan) -> None:
        if next(count) == step:
            raise error

    return before


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no room"), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("secret"), FailureKind.GENERATION),
    ],
)
def test_a_failing_step_fails_its_rows_only(
    house: House, error: Exception, kind: FailureKind
) -> None:
    house.engine.before_forward = fail_at(1, error)
    front = house.connect()
    front.send(add(1, [1, 2], max_new=6))
    house.turn(3)
    front.send(add(2, [3, 4], max_new=6))
    house.run(front)
    assert set(front.failed) == {1}
    assert front.failed[1].kind is kind
    assert "secret" not in front.failed[1].message
    assert front.tokens[2] == continuation([3, 4], 6)


def test_a_row_with_broken_logits_fails_alone(house: House) -> None:
    forward = house.engine.forward
    calls = iter(range(1000))

    def poisoned(plan: StepPlan):  # type: ignore[no-untyped-def]
        logits = forward(plan)
        if next(calls) == 2:
            logits[0] = math.nan
        return logits

    house.engine.forward = poisoned  # type: ignore[method-assign]
    front = house.connect()
    for seq_id in (1, 2, 3):
        front.send(add(seq_id, [seq_id, 7], max_new=6))
    house.turn(2)
    house.run(front)
    assert set(front.failed) == {1}
    for seq_id in (2, 3):
        assert front.tokens[seq_id] == continuation([seq_id, 7], 6)


def test_a_front_that_does_not_read_holds_nobody_up(house: House) -> None:
    lazy, keen = house.connect(), house.connect()
    lazy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    for round_ in range(200):
        lazy.send(add(round_, [1, 2], max_new=20))
        house.turn(4)
    keen.send(add(1, [3, 4], max_new=8))
    while house.scheduler.has_work or not keen.finish:
        house.turn()
        keen.read()
    assert keen.tokens[1] == continuation([3, 4], 8)
    lazy.read()
    house.turn(50)
    lazy.read()
    assert len(lazy.finish) == 200


def test_a_prompt_past_its_deadline_ends_in_the_middle_and_frees_its_memory(house: House) -> None:
    front = house.connect()
    front.send(add(1, list(range(50)), deadline=1.5))
    house.turn(2)
    assert house.memory.used
    house.turn(2)
    front.read()
    assert front.finish == {1: FinishReason.TIME_LIMIT}
    assert not front.tokens
    assert house.memory.used == 0


def broken_by(*seq_ids: int) -> Callable[[StepPlan], None]:
    def before(plan: StepPlan) -> None:
        if any(row.seq_id in seq_ids for row in plan.rows):
            raise RuntimeError

    return before


def test_a_row_that_breaks_every_step_fails_alone(house: House) -> None:
    front = house.connect()
    for seq_id in range(4):
        front.send(add(seq_id, [seq_id, 9], max_new=12))
    house.turn(3)
    house.engine.before_forward = broken_by(2)  # uids are given in order
    house.run(front)
    assert set(front.failed) == {2}
    for seq_id in (0, 1, 3):
        assert front.tokens[seq_id] == continuation([seq_id, 9], 12)
        assert front.finish[seq_id] is FinishReason.MAX_TOKENS


def test_new_prompts_that_fail_do_not_touch_those_that_run(house: House) -> None:
    house.engine.before_forward = broken_by(2, 3)
    front = house.connect()
    for seq_id in (0, 1):
        front.send(add(seq_id, [seq_id, 9], max_new=12))
    house.turn(3)
    for seq_id in (2, 3):
        front.send(add(seq_id, [seq_id] * 6, max_new=12))
    house.run(front)
    assert set(front.failed) == {2, 3}
    for seq_id in (0, 1):
        assert front.tokens[seq_id] == continuation([seq_id, 9], 12)
    failed = [out.step for out in front.outs if out.step is not None and out.step.num_errors]
    assert [(step.num_calls, step.num_errors) for step in failed] == [(5, 4)]


def test_a_step_that_is_too_large_for_memory_succeeds_in_parts(house: House) -> None:
    def before(plan: StepPlan) -> None:
        if plan.num_tokens > 5:
            raise MemoryError

    house.engine.before_forward = before
    front = house.connect()
    for seq_id in range(4):
        front.send(add(seq_id, [seq_id] * 4, max_new=6))
    house.turn(2)
    house.run(front)
    assert not front.failed
    for seq_id in range(4):
        assert front.tokens[seq_id] == continuation([seq_id] * 4, 6)
    assert sum(out.step.num_out_of_memory for out in front.outs if out.step) > 0


def test_every_step_is_reported_once_and_to_one_front(house: House) -> None:
    fronts = [house.connect(), house.connect()]
    for number, front in enumerate(fronts):
        front.send(add(1, [(number + i) % VOCAB for i in range(40)], max_new=4))
    house.turn()
    house.run(*fronts)
    steps = [out.step for front in fronts for out in front.outs if out.step is not None]
    assert len(steps) == len(house.engine.plans)
    assert sum(step.num_prefill_tokens for step in steps) == 80
    assert sum(step.num_calls for step in steps) == len(house.engine.plans)
    assert sum(step.num_joined for step in steps) == 1
    assert sum(step.counts.prefix_query_tokens for step in steps) == 80


def test_a_leak_is_reported_once_and_not_fatal(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    front = house.connect()
    for seq_id in range(3):
        house.memory._used += seq_id == 1
        front.send(add(seq_id, [1, 2], max_new=1))
        for _ in range(2):
            house.core.turn(0.0)
    front.read()
    assert len(front.finish) == 3
    (message,) = caplog.messages
    assert "the accounts are wrong: 1 tokens used by nobody" in message


@pytest.mark.parametrize("turns", [0, 3])
def test_sampled_tokens_do_not_depend_on_the_cache(house: House, turns: int) -> None:
    prompt = [(5 * i) % VOCAB for i in range(40)]
    sampling = SamplingParams(do_sample=True, seed=7, temperature=8.0)
    front = house.connect()
    for seq_id in range(3):  # cold, then from the row of the first, running or ended
        front.send(Add(seq_id, prompt, sampling, NO_DETAILS, 12, math.inf, 0.0))
        house.turn(4)
        house.turn(turns * 5)
    house.run(front)
    assert sum(out.step.counts.prefix_hit_tokens for out in front.outs if out.step) >= 2 * 32
    assert front.tokens[0] == front.tokens[1] == front.tokens[2]
    assert front.tokens[0] != continuation(prompt, 12)


def test_ten_thousand_streams_cancelled_at_random_points_leave_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    with open_house(tmp_path, slots=32, tokens=900, budget=80) as house:
        front = house.connect()
        alive: list[int] = []
        for seq_id in range(10_000):
            stem = [3] * rng.choice([0, 0, 40])
            prompt = stem + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            front.send(add(seq_id, prompt, max_new=rng.randint(1, 30)))
            alive.append(seq_id)
            while len(alive) > rng.randint(0, 60):
                front.send(Abort([alive.pop(rng.randrange(len(alive)))]))
            if seq_id % 8 == 0:
                house.turn()
            if seq_id % 2000 == 1999:  # the whole client goes
                front.read()
                front.sock.close()
                house.turn(3)  # its last words, then end of file
                assert house.scheduler.gauges().kv_tokens_used == 0
                assert not house.scheduler.has_work
                front, alive = house.connect(), []
        house.run(front)
        gauges = house.scheduler.gauges()
        assert (gauges.num_running, gauges.num_waiting, gauges.kv_tokens_used) == (0, 0, 0)


class Poison:
    """Makes the sampler fail whenever a certain sequence is among those that get a token."""

    def __init__(self, house: House, seq_id: int, times: int, error: Exception) -> None:
        self.seq_id, self.times, self.error, self.core = seq_id, times, error, house.core
        self._sample = house.core._sampler.sample
        house.core._sampler.sample = self.sample  # type: ignore[method-assign]

    def sample(self, uids: list[int], logits: torch.Tensor) -> list[Choice]:
        names = {self.core._by_uid[uid].request.seq_id for uid in uids}
        if self.seq_id in names and self.times:
            self.times -= 1
            raise self.error
        return self._sample(uids, logits)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_sequence_that_breaks_the_sampler_fails_alone(house: House, turns: int) -> None:
    front = house.connect()
    for seq_id in (1, 2, 3):
        front.send(add(seq_id, [seq_id, 7], max_new=8))
    house.turn(turns)
    Poison(house, 2, 100, RuntimeError("secret"))
    house.run(front)
    assert set(front.failed) == {2}
    assert (front.failed[2].kind, front.failed[2].message) == (
        FailureKind.GENERATION,
        "RuntimeError",
    )
    for seq_id in (1, 3):
        assert front.tokens[seq_id] == continuation([seq_id, 7], 8)


def test_memory_that_lacks_once_while_tokens_are_chosen_costs_nobody(house: House) -> None:
    front = house.connect()
    for seq_id in (1, 2, 3):
        front.send(add(seq_id, [seq_id], max_new=8))
    house.turn(2)
    Poison(house, 2, 1, MemoryError())
    house.run(front)
    assert not front.failed
    for seq_id in (1, 2, 3):
        assert front.tokens[seq_id] == continuation([seq_id], 8)


def test_input_details_that_cannot_be_made_fail_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loop, "input_details", fail)
    front = house.connect()
    front.send(add(1, [1, 2, 3]))
    front.send(add(2, [4, 5, 6], details=DetailParams(logprobs=True, input=True)))
    house.turn()
    house.run(front)
    assert set(front.failed) == {2}
    assert front.failed[2].kind is FailureKind.OUT_OF_MEMORY
    assert front.tokens[1] == continuation([1, 2, 3], 4)


def test_a_held_sequence_gets_nothing_until_it_is_let_go(house: House) -> None:
    front = house.connect()
    front.send(add(1, [1], max_new=6))
    house.turn(2)
    front.send(Hold(1, True))
    front.send(Hold(99, True))  # long gone
    house.turn(5)
    front.read()
    got = len(front.tokens[1])
    assert got < 6
    assert not front.finish
    front.send(Hold(1, False))
    house.run(front)
    assert front.tokens[1] == continuation([1], 6)
