"""The state machine of health, and the HTTP pages that show it."""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import aiohttp.web
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.front import http_api
from tgis.front.grpc_server import GrpcServer
from tgis.front.health import Health, State
from tgis.front.probe import Verdict
from tgis.observe.metrics import Limits, Metrics
from tgis.types import ModelInfo, ModelKind
from tgis.wire import Gauges, Loading

MODEL = ModelInfo(ModelKind.DECODER_ONLY, "e", "float32", 10, 20, 19, 100, 4)


@dataclass
class FakeLink:
    model: ModelInfo | None = None
    loading: Loading = field(default_factory=lambda: Loading(0, 0))
    gauges: Gauges = field(default_factory=Gauges)
    last_heard: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, model: ModelInfo | None) -> None:
        self.model = model
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass
class House:
    link: FakeLink
    health: Health
    now: list[float]


@pytest.fixture
def house() -> House:
    now = [100.0]
    link = FakeLink(last_heard=100.0)
    return House(link, Health(link, 5.0, clock=lambda: now[0]), now)  # type: ignore[arg-type]


def test_states(house: House) -> None:
    health, link = house.health, house.link
    assert health.state is State.STARTING
    link.model = MODEL
    assert health.state is State.READY
    house.now[0] = 105.0
    assert health.state is State.READY
    house.now[0] = 105.1
    assert health.state is State.DEGRADED
    link.last_heard = 105.0
    assert health.state is State.READY
    link.model = None
    assert health.state is State.DEAD
    link.model = MODEL
    assert health.state is State.READY
    health.draining = True
    assert health.state is State.DRAINING


async def test_watch_tells_every_change_once(house: House) -> None:
    seen: asyncio.Queue[State] = asyncio.Queue()
    task = asyncio.create_task(house.health.watch(seen.put_nowait))
    assert await seen.get() is State.STARTING
    house.link.become(MODEL)
    assert await seen.get() is State.READY
    house.link.become(None)
    assert await seen.get() is State.DEAD
    house.link.become(MODEL)
    assert await seen.get() is State.READY
    house.now[0] += 6  # silence is noticed without an event
    assert await seen.get() is State.DEGRADED
    task.cancel()
    assert seen.empty()


class FakeProbe:
    """A deep check with a given result."""

    verdict = Verdict.WORKS

    async def check(self) -> Verdict:
        return self.verdict


@pytest.fixture
def probe() -> FakeProbe:
    return FakeProbe()


@pytest.fixture
async def pages(house: House, probe: FakeProbe) -> AsyncIterator[aiohttp.ClientSession]:
    metrics = Metrics(Limits(512, 511, 8))
    app = http_api.make_app(house.health, house.link, probe, metrics)  # type: ignore[arg-type]
    runner, port = await http_api.start(app, "127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await runner.cleanup()


async def test_health_page(house: House, pages: aiohttp.ClientSession) -> None:
    house.link.loading = Loading(25, 100)
    async with pages.get("/health") as answer:
        assert answer.status == 503
        body = json.loads(await answer.text())
    assert body["error"] == "unhealthy"
    assert body["state"] == "starting"
    assert body["loading"] == {"bytes": 25, "total": 100, "percent": 25.0}
    house.link.model = MODEL
    async with pages.get("/health") as answer:
        assert (answer.status, await answer.text()) == (200, "")
    async with pages.head("/health") as answer:
        assert answer.status == 200


async def test_deep_page(house: House, probe: FakeProbe, pages: aiohttp.ClientSession) -> None:
    probe.verdict = Verdict.FAILED
    async with pages.get("/health?deep=1") as answer:
        assert answer.status == 503  # there is no model yet
        assert "check" not in await answer.json()
    house.link.model = MODEL
    for path, status in (("/health?deep=1", 503), ("/health?deep=0", 200), ("/health", 200)):
        async with pages.get(path) as answer:
            assert answer.status == status
    for verdict, error in (
        (Verdict.FAILED, "unhealthy"),
        (Verdict.UNAVAILABLE, "unhealthy"),
        (Verdict.TIMED_OUT, "Healthcheck timed-out"),
    ):
        probe.verdict = verdict
        async with pages.get("/health?deep=true") as answer:
            assert answer.status == 503
            assert await answer.json() == {
                "error": error,
                "state": "ready",
                "check": verdict.value,
            }
    probe.verdict = Verdict.WORKS
    async with pages.get("/health?deep=1") as answer:
        assert (answer.status, await answer.text()) == (200, "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/generate", 404),
        ("POST", "/health", 405),
        ("DELETE", "/metrics", 405),
    ],
)
async def test_nothing_else_answers(
    pages: aiohttp.ClientSession, method: str, path: str, status: int
) -> None:
    async with pages.request(method, path) as answer:
        assert (answer.status, await answer.text()) == (status, "")


async def test_metrics_page(pages: aiohttp.ClientSession) -> None:
    async with pages.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert "# TYPE tgi_request_count counter" in await answer.text()


async def test_a_taken_port_is_a_clear_error(pages: aiohttp.ClientSession) -> None:
    port = pages._base_url.port  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=rf"--port {port} .*in use"):
        await http_api.start(aiohttp.web.Application(), "127.0.0.1", port)  # type: ignore[arg-type]


class Walk:
    """Events of a server's life, and a plain model of what its state must then be."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.model_up = self.was_up = self.draining = self.failing = False
        self.heard = house.now[0]

    def happen(self, event: str) -> None:
        house = self.house
        match event:
            case "ready":
                house.link.become(MODEL)
                self.model_up, self.heard = True, house.now[0]
                house.link.last_heard = self.heard
            case "lost":
                house.link.become(None)
                self.model_up = False
            case "beat":
                house.link.last_heard = self.heard = house.now[0]
            case "silence":
                house.now[0] += 3
            case "fails" | "works":
                house.health.failing = self.failing = event == "fails"
            case "drain":
                house.health.draining = self.draining = True

    def expected(self) -> State:
        self.was_up |= self.model_up
        if self.draining:
            return State.DRAINING
        if not self.model_up:
            return State.DEAD if self.was_up else State.STARTING
        silent = self.house.now[0] - self.heard > 5
        return State.DEGRADED if silent or self.failing else State.READY


async def test_http_and_grpc_agree_in_every_state_of_a_long_walk(
    house: House, pages: aiohttp.ClientSession
) -> None:
    server = GrpcServer(Config(host="127.0.0.1", grpc_port=0), lambda: house.health.is_ready)
    port = await server.start()
    walk, chance = Walk(house), random.Random(5)
    events = ["ready", "lost", "beat", "beat", "silence", "fails", "works", "works"]
    seen = set()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for number in range(500):
            walk.happen("drain" if number == 490 else chance.choice(events))
            expected = walk.expected()
            seen.add(expected)
            assert house.health.state is expected, number
            async with pages.get("/health") as answer:
                assert (answer.status == 200) is (expected is State.READY), number
                if answer.status != 200:
                    assert (await answer.json())["state"] == expected.value
            status = (await stub.Check(health_pb2.HealthCheckRequest())).status
            serving = health_pb2.HealthCheckResponse.SERVING
            assert (status == serving) is (expected is State.READY), number
    await server.stop(0)
    assert seen == set(State)


def dribble(pages: aiohttp.ClientSession, data: bytes) -> socket.socket:
    """A connection on which only the beginning of a request comes."""
    url = pages._base_url
    assert url is not None
    sock = socket.create_connection((str(url.host), url.port or 0), 5)
    sock.sendall(data)
    return sock


async def closed(sock: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while await asyncio.to_thread(sock.recv, 1 << 16):
            pass
    return True


@pytest.mark.parametrize("data", [b"", b"GET /health HTTP/1.1\r\nHost: ", b"GET"])
async def test_a_request_that_does_not_come_in_whole_ends(
    monkeypatch: pytest.MonkeyPatch, house: House, probe: FakeProbe, data: bytes
) -> None:
    monkeypatch.setattr(http_api, "_REQUEST_SECONDS", 0.05)
    metrics = Metrics(Limits(512, 511, 8))
    app = http_api.make_app(house.health, house.link, probe, metrics)  # type: ignore[arg-type]
    runner, port = await http_api.start(app, "127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        with dribble(session, data) as sock:
            assert await closed(sock)
    await runner.cleanup()


async def test_an_answer_that_nobody_reads_ends(
    monkeypatch: pytest.MonkeyPatch, pages: aiohttp.ClientSession
) -> None:
    monkeypatch.setattr(http_api, "_REQUEST_SECONDS", 0.05)
    monkeypatch.setattr(Metrics, "render", lambda _: bytes(64 << 20))  # no buffer takes it whole
    with dribble(pages, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        assert await asyncio.to_thread(sock.recv, 1)
        await asyncio.sleep(0.2)  # in which nothing is read
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while data := await asyncio.to_thread(sock.recv, 1 << 20):
                received += len(data)
    assert received < 64 << 20


async def test_the_oldest_connection_gives_way(
    monkeypatch: pytest.MonkeyPatch, pages: aiohttp.ClientSession
) -> None:
    monkeypatch.setattr(http_api, "_MAX_CONNECTIONS", 2)
    idle = [dribble(pages, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(2)]
    for sock in idle:  # the server knows them
        assert await asyncio.to_thread(sock.recv, 1)
    async with pages.get("/health") as answer:
        assert answer.status == 503
    assert await closed(idle[0])
    for sock in idle:
        sock.close()
