"""Promise 1: a killed core costs its streams one second, and the server a few."""

import asyncio
import os
import signal
import time

import grpc
from tests.kit.server import Server

from .figures import Figure, Promise
from .house import (
    Ended,
    HealthWatch,
    begin,
    finish,
    holdings,
    pid_of,
    serves_again,
    serving,
    single,
    streaming,
)

STREAMS = 64


async def kill(server: Server) -> tuple[float, list[Ended]]:
    """Kill the core under many streams; returns when, and how they ended."""
    with streaming(server.grpc) as stub:
        calls = [await begin(stub, single(900)) for _ in range(STREAMS)]
        reading = [asyncio.create_task(finish(call)) for call in calls]
        await asyncio.sleep(0)
        at = time.monotonic()
        os.kill(pid_of(server, "core"), signal.SIGKILL)
        return at, await asyncio.gather(*reading)


def is_right(ended: Ended) -> bool:
    """UNAVAILABLE with a cause and a hint."""
    told = "died" in ended.details and int(ended.trailers.get("retry-after-ms", "0")) > 0
    return ended.code is grpc.StatusCode.UNAVAILABLE and told


def measure(full: bool) -> list[Figure]:
    """See the module."""
    with serving() as server, HealthWatch(server) as health:
        at, streams = asyncio.run(kill(server))
        again = serves_again(server)
        bad = health.first(503, at) - at
        kills, wrong = 50 if full else 2, sum(not is_right(ended) for ended in streams)
        lasting = [pid_of(server, "front"), server.process.pid]
        kill_quietly(server)  # what the first deaths set up is there to stay
        before = holdings(*lasting)
        for _ in range(kills):
            kill_quietly(server)
        after = holdings(*lasting)
        false_good = sum(status == 200 for t, _, status in health.looks if at + 0.5 < t < again - 1)
    return [
        Figure("streams of 64 without UNAVAILABLE, cause and retry-after-ms", wrong, 0),
        Figure("last stream told after", max(s.at for s in streams) - at, 1.0, " s", steady=False),
        Figure("health is NOT_SERVING after", bad, 0.5, " s", steady=False),
        Figure("healthy answers of /health before it serves again", false_good, None),
        Figure("serves again after", again - at, 8.0, " s", steady=False),
        Figure(f"growth of files, threads, memory after {kills} kills", after.growth(before), 5,
               " %"),
    ]  # fmt: skip


def kill_quietly(server: Server) -> None:
    """Kill the core, and wait for the next one."""
    os.kill(pid_of(server, "core"), signal.SIGKILL)
    time.sleep(0.3)
    serves_again(server)


PROMISE = Promise("core_killed", "kill -9 of the core under 64 streams", measure)

if __name__ == "__main__":
    PROMISE.main()
