"""The deep check, and what failed generations do to the health."""

import asyncio
from dataclasses import dataclass, field
from typing import cast

import pytest
from tests.kit.waiting import turn_often, until

from tgis.errors import GenerationFailed, OutOfMemory, RequestError, Unavailable
from tgis.front import probe as probe_module
from tgis.front.health import Health, State
from tgis.front.link import CoreLink
from tgis.front.probe import Doubt, Probe, Verdict
from tgis.front.streams import Job, Streams
from tgis.front.tokenize import TextTokenizer
from tgis.types import ModelInfo, ModelKind


class FakeTokenizer:
    """Only as much as the probe needs."""

    async def encode(self, text: str, truncate: int) -> object:
        assert (text, truncate) == ("liveness", 1)
        return type("Encoding", (), {"ids": [5]})


@dataclass
class FakeStreams:
    """Streams that end as the test says, once `gate` is open."""

    error: RequestError | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    jobs: list[Job] = field(default_factory=list)
    num_open: int = 0

    def open(self, job: Job) -> "FakeStreams":
        if isinstance(self.error, Unavailable):
            raise self.error
        self.jobs.append(job)
        return self

    def __enter__(self) -> "FakeStreams":
        self.num_open += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self.num_open -= 1

    async def collect(self) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def streams() -> FakeStreams:
    return FakeStreams()


def make(streams: FakeStreams, timeout: float = 60.0) -> Probe:
    return Probe(cast(Streams, streams), cast(TextTokenizer, FakeTokenizer()), timeout)


async def test_one_token_outside_the_metrics(streams: FakeStreams) -> None:
    streams.gate.set()
    assert await make(streams).check() is Verdict.WORKS
    (job,) = streams.jobs
    assert (job.token_ids, job.max_new_tokens, job.measured) == ([5], 1, False)
    assert streams.num_open == 0


async def test_checks_at_the_same_time_are_one(streams: FakeStreams) -> None:
    probe = make(streams)
    checks = [asyncio.create_task(probe.check()) for _ in range(50)]
    await asyncio.sleep(0)
    checks[0].cancel()  # its client has gone; the others still want to know
    streams.gate.set()
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert set(results[1:]) == {Verdict.WORKS}
    assert len(streams.jobs) == 1
    await probe.check()
    assert len(streams.jobs) == 2


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (GenerationFailed("x"), Verdict.FAILED),
        (OutOfMemory("x"), Verdict.FAILED),
        (Unavailable("x"), Verdict.UNAVAILABLE),
    ],
)
async def test_errors(streams: FakeStreams, error: RequestError, verdict: Verdict) -> None:
    streams.error = error
    streams.gate.set()
    assert await make(streams).check() is verdict


async def test_time_is_bounded_and_nothing_is_left_open(streams: FakeStreams) -> None:
    assert await make(streams, timeout=0.01).check() is Verdict.TIMED_OUT
    assert len(streams.jobs) == 1
    assert streams.num_open == 0


MODEL = ModelInfo(ModelKind.DECODER_ONLY, "e", "float32", 10, 20, 19, 100, 4)


@dataclass
class FakeLink:
    model: ModelInfo | None = MODEL
    last_heard: float = 0.0


@pytest.fixture
def health() -> Health:
    return Health(cast(CoreLink, FakeLink()), 5.0, clock=lambda: 0.0)


async def test_a_failure_that_does_not_repeat_changes_nothing(
    streams: FakeStreams, health: Health
) -> None:
    doubt = Doubt(make(streams), health)
    task = asyncio.create_task(doubt.settle())
    doubt.rise()
    await until(lambda: streams.num_open)
    assert health.state is State.READY  # in doubt for the server
    streams.gate.set()
    await until(lambda: not streams.num_open)
    assert health.state is State.READY
    task.cancel()


async def test_an_engine_that_fails_on_a_test_is_degraded_until_it_works(
    streams: FakeStreams, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_RETRY_SECONDS", 0.0)
    streams.error = GenerationFailed("x")
    streams.gate.set()
    doubt = Doubt(make(streams), health)
    task = asyncio.create_task(doubt.settle())
    await asyncio.sleep(0)
    assert health.state is State.READY
    doubt.rise()
    await until(lambda: health.state is State.DEGRADED)
    streams.error = Unavailable("the core is being replaced")
    tries = len(streams.jobs)
    await turn_often()
    assert health.state is State.DEGRADED  # nothing has shown that it works
    streams.error = None
    await until(lambda: health.state is State.READY)
    assert len(streams.jobs) > tries
    task.cancel()
