"""Promise 2: a hung core is noticed in five seconds; a long prefill is not taken for one."""

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
from tests.kit.processes import alive, children
from tests.kit.server import Server

from tgis.proto import generation_pb2_grpc as pb_grpc

from . import slow_engine
from .figures import Figure, Promise
from .house import (
    Ended,
    HealthWatch,
    batch,
    begin,
    finish,
    pid_of,
    serves_again,
    serving,
    single,
    streaming,
)

STREAMS = 16
PREFILL = {True: 60.0, False: 7.0}  # seconds; more than --hang-timeout


async def strike(server: Server, pid: int, number: signal.Signals) -> tuple[float, list[Ended]]:
    """Send a signal under load; returns when, and how the streams ended."""
    with streaming(server.grpc) as stub:
        calls = [await begin(stub, single(900)) for _ in range(STREAMS)]
        reading = [asyncio.create_task(finish(call)) for call in calls]
        await asyncio.sleep(0)
        at = time.monotonic()
        os.kill(pid, number)
        return at, await asyncio.gather(*reading)


def stopped(full: bool) -> list[Figure]:
    """SIGSTOP of the core of one process."""
    with serving() as server, HealthWatch(server) as health:
        core = pid_of(server, "core")
        at, streams = asyncio.run(strike(server, core, signal.SIGSTOP))
        again = serves_again(server)
        noticed = health.first(503, at) - at
        log = server.log()
        stacks = "Thread 0x" in log and "most recent call first" in log and "in turn" in log
    told = max(stream.at for stream in streams) - at
    wrong = sum(stream.code is not grpc.StatusCode.UNAVAILABLE for stream in streams)
    return [
        Figure("stopped core noticed after", noticed, 5.0, " s", steady=False),
        Figure("streams told after that", told - noticed, 1.0, " s", steady=False),
        Figure(f"streams of {STREAMS} without UNAVAILABLE", wrong, 0),
        Figure("stacks of its threads in the log", stacks, 1, least=True),
        Figure("stopped process left", alive(core), 0),
        Figure("serves again after", again - at, 13.0, " s", steady=False),
    ]


def ranks_of(server: Server) -> dict[str, int]:
    """Leader and rank 1 of a model in two parts."""
    core = children(server.process.pid)["tgis.core"]
    (rank,) = map(int, Path(f"/proc/{core}/task/{core}/children").read_text().split())
    return {"leader": core, "rank 1": rank}


def sharded(full: bool) -> list[Figure]:
    """Two ranks: killing or stopping either has the same consequences."""
    figures = []
    with serving("--num-shard", "2") as server:
        victims = ("leader", "rank 1") if full else ("rank 1",)
        for victim in victims:
            for number, verb in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")):
                ranks = ranks_of(server)
                at, streams = asyncio.run(strike(server, ranks[victim], number))
                wrong = sum(s.code is not grpc.StatusCode.UNAVAILABLE for s in streams)
                again = serves_again(server)
                limit = 1.0 if number is signal.SIGKILL else 6.0
                told = max(stream.at for stream in streams) - at
                left = sum(alive(pid) for pid in ranks.values())
                figures += [
                    Figure(f"{victim} of two {verb}: streams told after", told, limit, " s",
                           steady=False),
                    Figure(f"{victim} of two {verb}: streams without UNAVAILABLE", wrong, 0),
                    Figure(f"{victim} of two {verb}: processes left of the group", left, 0),
                    Figure(f"{victim} of two {verb}: serves again after", again - at, limit + 12,
                           " s", steady=False),
                ]  # fmt: skip
    return figures


def long_prefill(full: bool) -> list[Figure]:
    """A step that computes for long is left alone, and health is answered all through."""
    seconds = PREFILL[full]
    with (
        slow_engine.plugged_in(seconds) as env,
        serving("--deployment-framework", slow_engine.NAME, env=env) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        core, stub = pid_of(server, "core"), pb_grpc.GenerationServiceStub(channel)
        with HealthWatch(server) as health:
            start = time.monotonic()
            request = batch(2, "The little dog ran. " * 40)
            answer = stub.Generate(request, timeout=seconds + 60)
            took = time.monotonic() - start
        replaced = core != pid_of(server, "core") or "silent" in server.log()
        bad = sum(status != 200 for *_, status in health.looks)
    return [
        Figure("a legitimate prefill took", took, seconds, " s", least=True),
        Figure("... and was taken for a hang", replaced, 0),
        Figure("... tokens it gave", answer.responses[0].generated_token_count, 2, least=True),
        Figure("... /health p99 meanwhile", health.p99() * 1e3, 50, " ms", steady=False),
        Figure("... answers of /health other than 200", bad, 0),
    ]


def measure(full: bool) -> list[Figure]:
    """See the module."""
    return [*stopped(full), *long_prefill(full), *sharded(full)]


PROMISE = Promise("core_stopped", "kill -STOP of the core, of a rank; a long prefill", measure)

if __name__ == "__main__":
    PROMISE.main()
