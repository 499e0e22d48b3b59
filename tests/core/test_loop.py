"""The core loop on a real socket, with the fake engine and the real sampler."""

import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.kit.fake_engine import VOCAB, FakeEngine, continuation

from tgis.core.budget import PagedBudget
from tgis.core.kv.rows import RowsMemory
from tgis.core.link import FrontLink
from tgis.core.loop import Core
from tgis.core.scheduler import Scheduler
from tgis.engines.base import CacheShape
from tgis.engines.plan import StepPlan
from tgis.sampling.sampler import Sampler
from tgis.types import NO_DETAILS, DetailParams, FinishReason, SamplingParams
from tgis.wire import (
    Abort,
    Add,
    Decoder,
    Failed,
    FailureKind,
    Gauges,
    Loading,
    Out,
    ToFront,
    encode,
)

SLOTS = 4


@dataclass
class Pulse:
    step_started: float = 0.0
    gauges: Gauges = field(default_factory=Gauges)


class Front:
    """A blocking client of the core's socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(10)
        self._decoder: Decoder[ToFront] = Decoder(ToFront)
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.failed: dict[int, Failed] = {}
        self.outs: list[Out] = []

    def send(self, message: Add | Abort) -> None:
        self.sock.sendall(encode(message))

    def read(self) -> None:
        """Take in what is there now."""
        self.sock.setblocking(False)
        try:
            while data := self.sock.recv(1 << 16):
                for message in self._decoder.feed(data):
                    self._note(message)
        except BlockingIOError:
            pass

    def _note(self, message: ToFront) -> None:
        if isinstance(message, Failed):
            assert message.seq_id not in self.failed
            self.failed[message.seq_id] = message
        if not isinstance(message, Out):
            return
        self.outs.append(message)
        for token in message.tokens:
            assert token.seq_id not in self.finish, "a token after the end"
            if token.token_id >= 0:
                self.tokens.setdefault(token.seq_id, []).append(token.token_id)
            if token.finish is not FinishReason.NOT_FINISHED:
                self.finish[token.seq_id] = token.finish


@dataclass
class House:
    path: Path
    link: FrontLink
    core: Core
    engine: FakeEngine
    scheduler: Scheduler
    memory: RowsMemory
    now: list[float]
    fronts: list[Front] = field(default_factory=list)

    def connect(self) -> Front:
        self.fronts.append(Front(self.path))
        return self.fronts[-1]

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.core.turn(0.0)
            self.now[0] += 1
        assert self.core.check() is None

    def run(self, *fronts: Front) -> None:
        self.turn()
        while self.scheduler.has_work:
            self.turn()
        for front in fronts:
            front.read()
        assert self.memory.used == 0
        assert not self.core._by_uid
        assert not self.core._sequences
        assert not self.core._sampler._sequences
        assert self.memory.check() is None


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    path = tmp_path / "core.sock"
    link = FrontLink(path)
    engine = FakeEngine()
    engine.allocate(CacheShape(2 * SLOTS, 64))
    memory = RowsMemory(2 * SLOTS, 200)
    scheduler = Scheduler(
        memory,
        PagedBudget(200, horizon=16),
        max_step_tokens=16,
        max_running=SLOTS,
        eos_token_ids=[],
    )
    now = [0.0]
    core = Core(engine, Sampler(VOCAB, ()), scheduler, link, Pulse(), clock=lambda: now[0])
    house = House(path, link, core, engine, scheduler, memory, now)
    yield house
    for front in house.fronts:
        front.sock.close()
    link.close()


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
