"""Promise 2: a hung core is noticed in five seconds; a long prefill is not taken for one."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from tests.kit.processes import alive, children
from tests.kit.server import Server

from tgis.proto import generation_pb2_grpc as pb_grpc

from . import slow_engine
from .figures import AT_LEISURE, Figure, Promise
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


@dataclass(frozen=True)
class Strike:
    """What a signal to one process led to, in seconds after it."""

    wrong: int  # streams that ended otherwise than promised
    noticed: float  # /health is 503
    told: float
    serves_again: float
    stacks: bool  # of its threads are in the log
    left: int  # of the processes that were there


async def signal_under_load(
    server: Server, pid: int, number: signal.Signals
) -> tuple[float, list[Ended]]:
    """Send a signal under load; returns when, and how the streams ended."""
    with streaming(server.grpc) as stub:
        calls = await asyncio.gather(*(begin(stub, single(900)) for _ in range(STREAMS)))
        reading = [asyncio.create_task(finish(call)) for call in calls]
        await asyncio.sleep(0)
        at = time.monotonic()
        os.kill(pid, number)
        return at, await asyncio.gather(*reading)


def strike(server: Server, pid: int, number: signal.Signals, group: list[int]) -> Strike:
    """Strike one of a group of processes, and wait for the next group."""
    written = len(server.log())
    with HealthWatch(server) as health:
        at, streams = asyncio.run(signal_under_load(server, pid, number))
        again = serves_again(server)
    log = server.log()[written:]
    return Strike(
        wrong=sum(stream.code is not grpc.StatusCode.UNAVAILABLE for stream in streams),
        noticed=health.first(503, at) - at,
        told=max(stream.at for stream in streams) - at,
        serves_again=again - at,
        stacks="Thread 0x" in log and "most recent call first" in log,
        left=sum(map(alive, group)),
    )


def figures_of(who: str, number: signal.Signals, found: Strike) -> list[Figure]:
    """The same is promised of every process that computes."""
    stopped = number is signal.SIGSTOP
    name = f"{who} {'stopped' if stopped else 'killed'}"
    noticed = 5.0 if stopped else 0.5
    figures = [
        Figure(f"{name}: /health is 503 after", found.noticed, noticed, " s", slack=AT_LEISURE),
        Figure("... last stream told after", found.told, 6.0 if stopped else 1.0, " s",
               slack=AT_LEISURE),
        Figure(f"... streams of {STREAMS} without UNAVAILABLE", found.wrong, 0),
        Figure("... processes of it left", found.left, 0),
        Figure("... serves again after", found.serves_again, 13.0 if stopped else 8.0, " s",
               slack=AT_LEISURE),
    ]  # fmt: skip
    if stopped:
        figures.append(Figure("... stacks of its threads in the log", found.stacks, 1, least=True))
    return figures


def alone(full: bool) -> list[Figure]:
    """SIGSTOP of the core of one process."""
    figures = []
    with serving() as server:
        for _ in range(3 if full else 1):
            core = pid_of(server, "core")
            found = strike(server, core, signal.SIGSTOP, [core])
            figures += figures_of("core", signal.SIGSTOP, found)
    return figures


def ranks_of(server: Server) -> dict[str, int]:
    """Leader and rank 1 of a model in two parts."""
    core = children(server.process.pid)["tgis.core"]
    (rank,) = map(int, Path(f"/proc/{core}/task/{core}/children").read_text().split())
    return {"leader of two": core, "rank 1 of two": rank}


def sharded(full: bool) -> list[Figure]:
    """Two ranks: killing or stopping either has the same consequences."""
    figures = []
    with serving("--num-shard", "2") as server:
        for who in ranks_of(server) if full else ("rank 1 of two",):
            for number in (signal.SIGKILL, signal.SIGSTOP):
                ranks = ranks_of(server)
                found = strike(server, ranks[who], number, list(ranks.values()))
                figures += figures_of(who, number, found)
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
        Figure("... /health p99 meanwhile", health.p99() * 1e3, 50, " ms",
               slack=AT_LEISURE),
        Figure("... answers of /health other than 200", bad, 0),
    ]  # fmt: skip


def measure(full: bool) -> list[Figure]:
    """See the module."""
    return [*alone(full), *long_prefill(full), *sharded(full)]


PROMISE = Promise("core_stopped", "kill -STOP of the core, of a rank; a long prefill", measure)

if __name__ == "__main__":
    PROMISE.main()
