"""Promise 4: cancelled streams and vanished clients leave nothing behind."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass

import grpc
from tests.kit import http2
from tests.kit.processes import open_files, wait_until
from tests.kit.server import Server

from tgis.proto import generation_pb2_grpc as pb_grpc

from .census import DIRECTORY, Numbers, ask, counted
from .figures import AT_LEISURE, Figure, Promise
from .house import (
    GENERATE_STREAM,
    TEXT,
    cache_rss,
    compute_every_size,
    finish,
    gauge,
    pid_of,
    rss,
    serving,
    settle,
    single,
    streaming,
    wait_idle,
)

AT_ONCE = 32
VANISHED = 200  # at once
PERMITS = 256
FLAGS = ("--max-batch-size", "8", "--max-concurrent-requests", str(PERMITS))
CACHE_MIB = 24  # so few that `fill_cache` is quick
FLAGS += ("--kv-cache-memory", f"{CACHE_MIB}MiB", "--no-log-prompts")
LENGTHS = (1, 2, 20, 60)
LONG = "The little dog ran to the park. " * 60


async def cancel_one(stub: pb_grpc.GenerationServiceStub, rng: random.Random) -> None:
    """Leave a stream at a random point: unsent, queued, in its prompt, its middle, at its end."""
    tokens = rng.choice(LENGTHS)
    request = single(tokens, rng.choice([TEXT, TEXT, LONG]), rng.randrange(99))
    if rng.random() < 0.2:
        request.params.stopping.time_limit_millis = 3_600_000
    call = stub.GenerateStream(request)
    patience = rng.choice([0, 0, 1, 2, tokens, tokens + 1])
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.05)
        for _ in range(patience):
            if await call.read() is grpc.aio.EOF:
                break
    call.cancel()


async def storm(address: str, count: int, seed: int) -> None:
    """Many cancelled streams, some at the same time."""
    rng = random.Random(seed)
    numbers = iter(range(count))
    with streaming(address) as stub:

        async def worker() -> None:
            for _ in numbers:
                await cancel_one(stub, rng)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


def break_off(address: str, count: int) -> None:
    """Clients that are killed in the middle of a stream: their connection is reset."""
    request = http2.call(1, GENERATE_STREAM, single(200))
    for _ in range(0, count, AT_ONCE):
        clients = [http2.connect(address, 0) for _ in range(AT_ONCE)]
        for client in clients:
            client.sendall(request)
        time.sleep(0.02)
        for client in clients:
            http2.reset(client)


def vanish(server: Server, count: int) -> float:
    """Clients that fall silent and never close: seconds until the server has let all of them go."""
    front = pid_of(server, "front")
    files = open_files(front)
    clients = [http2.connect(server.grpc, 0) for _ in range(count)]
    for client in clients:
        client.sendall(http2.call(1, GENERATE_STREAM, single(200)))
    start = time.monotonic()
    time.sleep(1.0)
    wait_idle(server)
    wait_until(lambda: open_files(front) <= files + 2)
    took = time.monotonic() - start
    for client in clients:
        client.close()
    return took


async def steps_after_cancel(server: Server, rounds: int) -> float:
    """The most steps that the engine made for a stream after the front had let go of it."""
    most = 0.0
    name = 'tgi_batch_inference_count_total{method="next_token"}'
    with streaming(server.grpc) as stub:
        for _ in range(rounds):
            before = await asyncio.to_thread(gauge, server, name)
            call = stub.GenerateStream(single(500))
            for _ in range(10):
                await call.read()
            call.cancel()
            await asyncio.to_thread(wait_idle, server)
            made = await asyncio.to_thread(gauge, server, name) - before
            most = max(most, made - generated(server) + 1)  # the first came of the prompt's step
    return most


def generated(server: Server) -> int:
    """Tokens of the stream cancelled last, as the front had counted when it heard of that."""
    while True:
        lines = [line for line in server.log().splitlines() if "before Cancelled" in line]
        if lines:
            return int(lines[-1].partition(" generated ")[2].split()[0])


async def fill_cache(address: str) -> None:
    """Make the cache of prefixes hold the same each time: as much as it can."""
    with streaming(address) as stub:
        for number in range(8):
            request = single(1, f"Number {number}. {LONG * 4}")
            request.params.truncate_input_tokens = 900
            await finish(stub.GenerateStream(request))


@dataclass(frozen=True)
class Memory:
    """Bytes that are resident when nothing is to be done and the cache is full."""

    front: int
    core: int  # without the cache
    cache: int  # keys and values; a prompt may not quite fit, so it varies below its limit


def memory_of(server: Server) -> Memory:
    """What they hold."""
    wait_idle(server)
    asyncio.run(fill_cache(server.grpc))
    settle(server)
    core = pid_of(server, "core")
    cache = cache_rss(core)
    return Memory(rss(pid_of(server, "front")), rss(core) - cache, cache)


def where(log: str) -> list[int]:
    """How many streams were cancelled before their first token, in their middle, with their last.

    Those that were never registered, or had ended by themselves, are in none of them.
    """
    counts = Counter[str]()
    for line in log.splitlines():
        if "before Cancelled" in line:
            made = int(line.partition(" generated ")[2].split()[0])
            counts["none" if not made else "all" if made in LENGTHS else "some"] += 1
    return [counts[name] for name in ("none", "some", "all")]


def idle_census(server: Server, directory: str) -> Numbers:
    """What front and core hold when nothing is to be done; what is on its way may arrive."""
    wait_idle(server)
    time.sleep(0.5)
    return ask(directory)


def measure(full: bool) -> list[Figure]:
    """See the module."""
    with counted() as env, serving(*FLAGS, "--write-timeout", "2", env=env) as server:
        return figures_of(server, env[DIRECTORY], full)


def figures_of(server: Server, directory: str, full: bool) -> list[Figure]:
    """All phases, one after the other, at one server."""
    streams, warm_up, waves = (10_000, 1_000, 10) if full else (1_000, 400, 1)
    front = pid_of(server, "front")
    steps = asyncio.run(steps_after_cancel(server, 20 if full else 5))
    empty = idle_census(server, directory)
    asyncio.run(compute_every_size(server.grpc))
    asyncio.run(storm(server.grpc, warm_up, 0))
    break_off(server.grpc, AT_ONCE)
    memory, files = memory_of(server), open_files(front)
    asyncio.run(storm(server.grpc, streams - warm_up, 1))
    later = memory_of(server)
    grown = [(later.front - memory.front) / 2**20, (later.core - memory.core) / 2**20]
    cancelled = where(server.log())
    break_off(server.grpc, VANISHED * waves)
    gone = max(vanish(server, VANISHED) for _ in range(waves))
    left = idle_census(server, directory)
    more_files = open_files(front) - files
    # Nobody can get as many permits as there are while some are lost.
    lost = asyncio.run(permits_lost(server, PERMITS))
    log = server.log()
    return [
        Figure("streams cancelled: registered, before their first token", cancelled[0], None),
        Figure("... between their tokens", cancelled[1], None),
        Figure("... with all of their tokens", cancelled[2], None),
        # On a busy machine some of them had been made before, and the front not yet been told.
        Figure("... steps computed for one after it, at most", steps, 1, slack=AT_LEISURE),
        # The short form takes its base when fewer streams have warmed the server up.
        Figure(f"growth of memory from stream {warm_up:,} to {streams:,}", sum(grown), 2, " MB",
               slack=2),
        Figure("... of which the front's", grown[0], None, " MB"),
        Figure("keys and values hold", later.cache / 2**20, CACHE_MIB, " MB"),
        Figure("clients killed; as many fell silent and never closed", VANISHED * waves, None),
        Figure(f"... {VANISHED} silent ones let go after (--write-timeout 2)", gone, 5, " s",
               slack=AT_LEISURE),
        *(Figure(f"{what} left", left[what] - before, 0) for what, before in empty.items()),
        Figure("permits lost", lost, 0),
        Figure("files left open", max(0, more_files), 2),
        Figure("leaks that the core reports", log.count("the accounts are wrong"), 0),
        Figure("tracebacks", log.count("Traceback"), 0),
    ]  # fmt: skip


async def permits_lost(server: Server, permits: int) -> int:
    """How many of so many streams at once are refused."""
    refused = 0
    with streaming(server.grpc) as stub:

        async def one() -> None:
            nonlocal refused
            try:
                async for _ in stub.GenerateStream(single(2)):
                    pass
            except grpc.aio.AioRpcError:
                refused += 1

        await asyncio.gather(*(one() for _ in range(permits)))
    return refused


PROMISE = Promise("cancelled_streams", "cancelled streams and vanished clients", measure)

if __name__ == "__main__":
    PROMISE.main()
