"""Promise 7: stopping and replacing servers loses nothing."""

import asyncio
import json
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc
from tests.kit.server import Server, free_ports, start_server

from tgis.proto import generation_pb2_grpc as pb_grpc

from .figures import Figure, Promise
from .house import DEMO, ONE_THREAD, batch, finish, single, streaming

FLAGS = ("--threads", "1", "--no-log-prompts", "--log-level", "warning")

# What a client of a load-balanced service sets: go round, skip who is not healthy, try once more.
SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "fmaas.GenerationService"},
        "methodConfig": [
            {
                "name": [{"service": "fmaas.GenerationService"}],
                "waitForReady": True,
                "retryPolicy": {
                    "maxAttempts": 2,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)


def start(directory: str, *flags: str, grpc_port: int | None = None) -> Server:
    """A server that is ready."""
    server = start_server(
        DEMO, Path(directory), *FLAGS, *flags, env=ONE_THREAD, grpc_port=grpc_port
    )
    server.wait_ready()
    return server


def end(server: Server) -> None:
    """Kill what still runs."""
    if server.process.poll() is None:
        server.kill()


async def in_flight(server: Server, count: int) -> tuple[Counter[str], float, int]:
    """SIGTERM with so many requests open: how they ended, after how long, and the exit code."""
    with streaming(server.grpc) as stub:
        calls = [stub.GenerateStream(single(16)) for _ in range(count)]
        first = await asyncio.gather(*(call.read() for call in calls))  # all are in
        assert all(message.input_token_count for message in first)
        at = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        endings = await asyncio.gather(*(finish(call) for call in calls))
    code = await asyncio.to_thread(server.process.wait, 30)
    lost = [e for e in endings if e.code is not grpc.StatusCode.OK or e.num_tokens != 16]
    counts = Counter(e.code.name for e in lost)
    return counts, max(e.at for e in endings) - at, code


async def roll(
    ports: list[int], servers: list[Server], directories: list[str], calls: int
) -> Counter[str]:
    """Restart both servers, one after the other, again and again, while calls go on."""
    target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    options = [("grpc.service_config", SERVICE_CONFIG), ("grpc.enable_retries", 1)]
    outcomes: Counter[str] = Counter()
    numbers = iter(range(calls))
    done = asyncio.Event()

    async def client(stub: pb_grpc.GenerationServiceStub) -> None:
        for _ in numbers:
            try:
                await stub.Generate(batch(2), timeout=60)
                outcomes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[f"{error.code().name}: {error.details()}"] += 1

    async def restart() -> None:
        while not done.is_set():
            for number, port in enumerate(ports):
                old = servers[number]
                old.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(old.process.wait, 60)
                outcomes["restarts"] += 1
                servers[number] = await asyncio.to_thread(
                    start, directories[number], grpc_port=port
                )
                await asyncio.sleep(1.0)  # for its clients to come back
                if done.is_set():
                    return

    async with grpc.aio.insecure_channel(target, options) as channel:
        restarting = asyncio.create_task(restart())
        await asyncio.gather(*(client(pb_grpc.GenerationServiceStub(channel)) for _ in range(16)))
        done.set()
        await restarting
    return outcomes


def measure(full: bool) -> list[Figure]:
    """See the module."""
    open_calls, calls = (1000, 20_000) if full else (300, 2_000)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        server = start(one, "--max-concurrent-requests", str(open_calls))
        try:
            lost, seconds, code = asyncio.run(in_flight(server, open_calls))
        finally:
            end(server)
        ports, servers = free_ports(2), []
        try:
            for directory, port in zip((one, two), ports, strict=True):
                servers.append(start(directory, grpc_port=port))
            outcomes = asyncio.run(roll(ports, servers, [one, two], calls))
        finally:
            for server in servers:
                end(server)
    restarts, good = outcomes.pop("restarts"), outcomes.pop("OK")
    for outcome, times in (*lost.items(), *outcomes.items()):
        print(f"  {times} x {outcome}")
    return [
        Figure(f"requests of {open_calls} open at SIGTERM that were lost", sum(lost.values()), 0),
        Figure("... finished after (--drain-timeout 60)", seconds, 60, " s",
               slack=1.5),
        Figure("... exit code", code, 0),
        Figure("restarts of one of two servers behind a client with one retry", restarts, None),
        Figure(f"calls of {calls} that were lost", calls - good, 0),
    ]  # fmt: skip


PROMISE = Promise("drain", "SIGTERM under load; a rolling restart of two servers", measure)

if __name__ == "__main__":
    PROMISE.main()
