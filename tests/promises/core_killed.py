"""Promise 1: a killed core costs its streams one second, and the server a few."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass

import grpc
from tests.kit.server import Server

from .figures import AT_LEISURE, Figure, Promise
from .house import (
    Ended,
    HealthStream,
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


@dataclass(frozen=True)
class Death:
    """What one kill led to, in seconds after it."""

    wrong: int  # streams that ended otherwise than promised
    last_told: float
    unhealthy_http: float
    unhealthy_grpc: float
    serves_again: float


async def kill(server: Server) -> tuple[float, list[Ended]]:
    """Kill the core under many streams; returns when, and how they ended."""
    with streaming(server.grpc) as stub:
        calls = await asyncio.gather(*(begin(stub, single(900)) for _ in range(STREAMS)))
        reading = [asyncio.create_task(finish(call)) for call in calls]
        await asyncio.sleep(0)
        at = time.monotonic()
        os.kill(pid_of(server, "core"), signal.SIGKILL)
        return at, await asyncio.gather(*reading)


def is_right(ended: Ended) -> bool:
    """UNAVAILABLE with a cause and a hint."""
    told = "died" in ended.details and int(ended.trailers.get("retry-after-ms", "0")) > 0
    return ended.code is grpc.StatusCode.UNAVAILABLE and told


def death(server: Server, http: HealthWatch, stream: HealthStream) -> Death:
    """One kill, and the wait for the next core."""
    at, streams = asyncio.run(kill(server))
    again = serves_again(server)
    return Death(
        wrong=sum(not is_right(ended) for ended in streams),
        last_told=max(ended.at for ended in streams) - at,
        unhealthy_http=http.first(503, at) - at,
        unhealthy_grpc=stream.first_bad(at) - at,
        serves_again=again - at,
    )


def measure(full: bool) -> list[Figure]:
    """See the module."""
    kills = 50 if full else 2

    def all_held(server: Server) -> tuple[int, ...]:
        return server.process.pid, pid_of(server, "front"), pid_of(server, "core")

    with serving() as server, HealthWatch(server) as http, HealthStream(server) as stream:
        # What the first deaths set up is there to stay.
        deaths = [death(server, http, stream) for _ in range(2)]
        before = holdings(*all_held(server))
        deaths += [death(server, http, stream) for _ in range(kills)]
        after = holdings(*all_held(server))
    grown = [
        Figure(f"growth of {what} after {kills} more such deaths", percent, 5, " %", slack=slack)
        for what, percent, slack in after.growth(before)
    ]
    return [
        Figure(f"deaths, each under {STREAMS} streams", len(deaths), None),
        Figure("streams without UNAVAILABLE, cause and retry-after-ms",
               sum(d.wrong for d in deaths), 0),
        Figure("last stream told after, at worst", max(d.last_told for d in deaths), 1.0, " s",
               slack=AT_LEISURE),
        Figure("/health is 503 after, at worst", max(d.unhealthy_http for d in deaths), 0.5,
               " s", slack=AT_LEISURE),
        Figure("grpc.health.v1 is NOT_SERVING after, at worst",
               max(d.unhealthy_grpc for d in deaths), 0.5, " s", slack=AT_LEISURE),
        Figure("serves again after, at worst", max(d.serves_again for d in deaths), 8.0, " s",
               slack=AT_LEISURE),
        *grown,
    ]  # fmt: skip


PROMISE = Promise("core_killed", "kill -9 of the core under 64 streams", measure)

if __name__ == "__main__":
    PROMISE.main()
