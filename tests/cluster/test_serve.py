"""Replicas behind Serve's proxies: what they answer, how they die, how many there are."""

import asyncio
import os
import random
import re
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.contract.cases import DEMO, Json, flags
from tests.contract.oracle import Limits
from tests.contract.test_contract import (
    FILES,
    method_of,
    run_shuffled,
    run_stream,
    run_unary,
    stream_request,
)
from tests.kit.client import connect
from tests.kit.ray_cluster import REPLICA, named, run_on_ray
from tests.kit.server import Server

from tgis.proto import generation_pb2 as pb
from tgis.proto.generation_pb2_grpc import GenerationServiceStub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCALING = (
    "--ray-replicas=1:3 --ray-target-requests=2 --ray-upscale-delay=1 --ray-downscale-delay=3"
    " --ray-cpus=0.25"
)
THREE = "--ray-replicas=3 --ray-cpus=0.25 --ray-routing=prefix"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One replica, and up to three when there is load."""
    with run_on_ray(DEMO, *flags(Limits()), *SCALING.split()) as served:
        yield served


@pytest.fixture(scope="module")
def three() -> Iterator[Server]:
    """Three replicas, whatever the load."""
    with run_on_ray(DEMO, *flags(Limits()), *THREE.split()) as served:
        yield served


@asynccontextmanager
async def stub(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        yield GenerationServiceStub(channel)


def replicas(server: Server) -> set[int]:
    return named(server.process.pid, REPLICA)


async def until(condition: Any, seconds: float = 300) -> None:
    """Wait for what only a look at processes or metrics tells."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def request_of(text: str, tokens: int = 20) -> pb.SingleGenerationRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=tokens, min_new_tokens=tokens)
    params = pb.Parameters(stopping=stopping)
    return pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), params=params)


def batch_of(*texts: str, tokens: int = 20) -> pb.BatchedGenerationRequest:
    items = [pb.GenerationRequest(text=text) for text in texts]
    return pb.BatchedGenerationRequest(requests=items, params=request_of("", tokens).params)


def metrics(server: Server, name: str) -> dict[str, float]:
    """A metric's samples by their labels."""
    _, page = server.get("/metrics", timeout=60)
    found = re.findall(rf"^{name}({{.*}}) (\S+)$", page, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def running(server: Server) -> dict[str, float]:
    """Requests that each replica works on."""
    return metrics(server, "tgi_batch_current_size")


async def test_status_and_metadata_come_through(server: Server) -> None:
    identifier = ("x-correlation-id", "abc-123")
    too_many = 100_000
    async with stub(server) as service:
        call = service.Generate(batch_of("Once"), metadata=[identifier])
        await call
        assert identifier in list(await call.trailing_metadata())
        call = service.GenerateStream(request_of("Once"), metadata=[identifier])
        assert [message async for message in call]
        assert identifier in list(await call.trailing_metadata())
        for call in (
            service.Generate(batch_of("Once", tokens=too_many), metadata=[identifier]),
            service.GenerateStream(request_of("Once", tokens=too_many), metadata=[identifier]),
        ):
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "max_new_tokens must be <=" in await call.details()
            assert identifier in list(await call.trailing_metadata())


async def test_bytes_that_are_no_request(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/fmaas.GenerationService/Generate")(b"\xff\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (
            await call.details() == "request is not a valid fmaas.BatchedGenerationRequest message"
        )


async def test_clients_that_do_not_wait_are_not_computed_for(server: Server) -> None:
    def cancelled() -> float:
        samples = metrics(server, "tgi_request_failure").items()
        return sum(value for labels, value in samples if 'err="cancelled"' in labels)

    before = cancelled()
    async with stub(server) as service:
        late = service.Generate(batch_of("Once upon", tokens=150), timeout=0.1)
        assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gone = service.GenerateStream(request_of("A cat", tokens=150))
        await gone.read()
        await gone.read()
        gone.cancel()
        await until(lambda: cancelled() == before + 2 and not any(running(server).values()))


async def test_health_and_reflection(server: Server) -> None:
    assert await asyncio.to_thread(server.get, "/health") == (200, "")
    assert (await asyncio.to_thread(server.get, "/nothing"))[0] == 404
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="fmaas.GenerationService")
        serving = health_pb2.HealthCheckResponse.SERVING
        assert (await health.Check(request)).status == serving
        watch = health.Watch(request)
        assert (await watch.read()).status == serving
        watch.cancel()
        unknown = health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert await unknown.code() is grpc.StatusCode.NOT_FOUND
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = await reflection.ServerReflectionInfo(iter([asked])).read()
        names = {service.name for service in answer.list_services_response.service}
        assert {"fmaas.GenerationService", "grpc.health.v1.Health"} <= names


def is_greedy(case: Json) -> bool:
    return bool(case["request"].get("params", {}).get("method", "GREEDY") == "GREEDY")


async def test_greedy_cases_of_the_contract(server: Server) -> None:
    file = FILES["demo"]
    assert file.limits == Limits()
    cases = [case for case in file.cases if is_greedy(case)]
    assert len(cases) > 30
    async with connect(server.grpc) as client:
        runs = [run_unary(client, case) for case in cases if method_of(case) != "GenerateStream"]
        requests = ((case, stream_request(case)) for case in cases)
        runs += [run_stream(client, file, case, it) for case, it in requests if it is not None]
        await run_shuffled(runs)


class Load:
    """Clients that ask again and again; what each call came to."""

    def __init__(self, server: Server, clients: int) -> None:
        self._server = server
        self._clients = clients
        self._over = asyncio.Event()
        self.outcomes: Counter[str] = Counter()

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def _ask(self, number: int) -> None:
        rng = random.Random(number)
        async with stub(self._server) as service:
            while not self._over.is_set():
                text = f"{rng.random()} times"
                self.outcomes[await self._one(service, text, rng.random() < 0.5)] += 1

    async def _one(self, service: Any, text: str, streaming: bool) -> str:
        """The status of a call; a call that ends without its last token has none."""
        try:
            if not streaming:
                (answer,) = (await service.Generate(batch_of(text, tokens=150))).responses
                return "OK" if answer.generated_token_count == 150 else "incomplete"
            count = 0
            async for message in service.GenerateStream(request_of(text, 150)):
                count = message.generated_token_count or count
        except grpc.aio.AioRpcError as error:
            hint = "retry-after-ms" in dict(error.trailing_metadata() or ())
            return error.code().name + (" with a hint" if hint else "")
        return "OK" if count == 150 else "incomplete"


async def test_scales_with_the_load_and_back(server: Server) -> None:
    await until(lambda: len(replicas(server)) == 1)
    async with Load(server, 12) as load:
        await until(lambda: sum(v > 0 for v in running(server).values()) == 3)
        assert len(replicas(server)) == 3
    await until(lambda: len(replicas(server)) == 1)
    assert set(load.outcomes) == {"OK"}


@pytest.mark.parametrize("name", [REPLICA, "tgis.hosted"], ids=["its actor", "its server"])
async def test_a_replica_is_killed_under_load(three: Server, name: str) -> None:
    """Every call has a status that says to try again, and the replica is replaced."""
    pid = three.process.pid
    async with Load(three, 9) as load:
        while "UNAVAILABLE with a hint" not in load.outcomes:
            await until(lambda: sum(v > 0 for v in running(three).values()) == 3)
            before = named(pid, name)
            os.kill(min(before), signal.SIGKILL)
            await until(lambda: len(named(pid, name) - before) == 1)  # noqa: B023
        await until(lambda: sum(v > 0 for v in running(three).values()) == 3)
        count = load.outcomes["OK"]
        await until(lambda: load.outcomes["OK"] > count + 6)
    assert set(load.outcomes) == {"OK", "UNAVAILABLE with a hint"}


async def test_prompts_that_begin_alike_meet(three: Server) -> None:
    def asked() -> dict[str, float]:
        return metrics(three, "tgi_prefix_cache_query_tokens")

    await until(lambda: len(running(three)) == 3 and not any(running(three).values()))
    places = []
    async with stub(three) as service:
        for number in range(8):
            system = f"Story number {number} is about a cat. " * 12
            before = asked()
            for turn in range(4):
                await service.Generate(batch_of(f"{system}{turn}", tokens=2))
            after = asked()
            places.append({name for name in after if before.get(name) != after[name]})
    assert all(len(place) == 1 for place in places), places
    assert len(set().union(*places)) > 1


async def test_a_model_in_parts(server: Server) -> None:
    """A replica of two ranks, each in a bundle of its placement group."""
    request = batch_of("Once upon a time", tokens=40)
    async with stub(server) as service:
        expected = (await service.Generate(request)).responses[0].text
    with run_on_ray(DEMO, *flags(Limits()), "--num-shard=2", "--ray-cpus=0.5") as whole:
        pid = whole.process.pid
        assert len(named(pid, REPLICA)) == 1
        assert len(named(pid, "ray::Rank")) == 1
        assert len(named(pid, "tgis.engines.rank_main")) == 1
        async with stub(whole) as service:
            assert (await service.Generate(request)).responses[0].text == expected


def test_a_port_that_is_taken() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AssertionError, match=r"tgis: --port=\d+: cannot listen on 127.0.0.1: Addr"),
        run_on_ray(DEMO, http_port=taken.getsockname()[1]),
    ):
        pass


def test_a_replica_that_cannot_start() -> None:
    with (
        pytest.raises(AssertionError, match=r"tgis: cannot serve: .*--kv-cache-memory"),
        run_on_ray(DEMO, "--kv-cache-memory=1MB", "--ray-cpus=0.25"),
    ):
        pass


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="tgis: "),
        run_on_ray(tmp_path / "nothing"),
    ):
        pass
