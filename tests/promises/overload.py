"""Promise 6: ten times the load changes little of what is done; tenants get equal shares."""

import asyncio
import mmap
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
from tests.kit.server import Server

from tgis.proto import generation_pb2_grpc as pb_grpc

from .figures import AT_LEISURE, Figure, Promise, percentile
from .house import (
    apart,
    batch,
    compute_every_size,
    gauge,
    pid_of,
    rss,
    serving,
    settle,
    single,
    streaming,
)

PERMITS = 32
NEW_TOKENS = 96
TIMES = 10
FLAGS = ("--max-concurrent-requests", str(PERMITS), "--max-batch-size", "16", "--no-log-prompts",
         "--log-level", "warning", "--prefix-caching", "false")  # fmt: skip
EXPECTED = ("OK", "RESOURCE_EXHAUSTED")
PROBE_PAUSE = 0.1

# Long answers keep the clients of 100 times the requests small, but shares take some turns of them.
TENANT_TOKENS = {True: 400, False: 100}
FEW = 20  # streams at once: always more than the half of the batch
AT_ONCE = 128  # requests of the other; a connection takes no more than 164
RATIO = 100


@dataclass
class Load:
    """What came of some load."""

    tokens: int = 0
    goodput: float = 0.0  # tokens of answered requests a second, once all is under way
    refusals: list[float] = field(default_factory=list)  # seconds until each was refused
    codes: Counter[str] = field(default_factory=Counter)

    async def measure(self, seconds: float) -> None:
        """Watch the goodput for so long, but for the beginning."""
        await asyncio.sleep(seconds / 6)
        start, before = time.monotonic(), self.tokens
        await asyncio.sleep(seconds * 5 / 6)
        self.goodput = (self.tokens - before) / (time.monotonic() - start)


async def ask(stub: pb_grpc.GenerationServiceStub, load: Load) -> None:
    """One request."""
    start = time.monotonic()
    try:
        answer = await stub.Generate(batch(NEW_TOKENS))
    except grpc.aio.AioRpcError as error:
        load.codes[error.code().name] += 1
        load.refusals.append(time.monotonic() - start)
    else:
        load.codes["OK"] += 1
        load.tokens += answer.responses[0].generated_token_count


async def peak(address: str, seconds: float) -> Load:
    """As many requests as are let in, never more."""
    load, start = Load(), time.monotonic()
    with streaming(address) as stub:

        async def client() -> None:
            while time.monotonic() < start + seconds:
                await ask(stub, load)

        await asyncio.gather(load.measure(seconds), *(client() for _ in range(PERMITS)))
    return load


async def flood(address: str, rate: float, seconds: float) -> Load:
    """Requests at a steady rate, whatever becomes of those before."""
    load, rng, tasks = Load(), random.Random(0), set()
    with streaming(address) as stub:
        measured = asyncio.create_task(load.measure(seconds))
        start = due = time.monotonic()
        while (now := time.monotonic()) < start + seconds:
            while due <= now:
                due += rng.expovariate(rate)
                task = asyncio.create_task(ask(stub, load))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(measured, *tasks)
    return load


def work(load: Callable[..., Any], *args: Any) -> Callable[[], dict[str, Any]]:
    """One of the above, for a process of its own."""
    return lambda: vars(asyncio.run(load(*args)))


def flooded(server: Server, rate: float, seconds: float) -> tuple[Load, Load]:
    """A flood, and beside it a client that has nothing to do but to see when it is refused."""
    many, one = apart(
        [
            work(flood, server.grpc, rate, seconds),
            work(flood, server.grpc, 1 / PROBE_PAUSE, seconds),
        ]
    )
    return Load(**many), Load(**one)


def overloaded(full: bool) -> list[Figure]:
    """Peak, then ten times the requests, in two halves."""
    seconds = 60.0 if full else 6.0
    with serving(*FLAGS) as server:
        # Until its memory has come to its size.
        apart([lambda: asyncio.run(compute_every_size(server.grpc))])
        apart([work(peak, server.grpc, seconds / 3)])
        (found,) = apart([work(peak, server.grpc, max(9.0, seconds / 3))])
        best = found["goodput"]
        rate = TIMES * best / NEW_TOKENS
        flooded(server, rate, seconds / 6)
        memory = [total_rss(server)]
        halves = []
        for _ in range(2):
            halves.append(flooded(server, rate, seconds))
            memory.append(total_rss(server))
        left = gauge(server, "tgi_queue_size") + gauge(server, "tgi_batch_current_size")
    codes = sum((load.codes for pair in halves for load in map(counted, pair)), Counter[str]())
    goodput = sum(load.goodput for pair in halves for load in pair) / 2
    refused = [1e3 * took for many, _ in halves for took in many.refusals]
    alone = [1e3 * took for _, one in halves for took in one.refusals]
    grown = [(after - before) / 2**20 for before, after in pairwise(memory)]
    return [
        Figure("peak", best, None, " tokens/s"),
        Figure(f"requests offered for {2 * seconds:.0f} s, times the peak's ({rate:.0f}/s)", TIMES,
               None),
        Figure("goodput under it, of the peak's", 100 * goodput / best, 90, " %", least=True,
               slack=AT_LEISURE / 2),
        Figure("refused", 100 * codes["RESOURCE_EXHAUSTED"] / codes.total(), None, " %"),
        Figure("refused after, median", percentile(alone, 50), 20, " ms", slack=AT_LEISURE),
        Figure("refused after, p99", percentile(alone, 99), 20, " ms", slack=2 * AT_LEISURE),
        Figure("... as the process sees it that sends the flood, p99", percentile(refused, 99),
               None, " ms"),
        Figure("answers other than OK and RESOURCE_EXHAUSTED",
               sum(n for code, n in codes.items() if code not in EXPECTED), 0),
        Figure("growth of memory in the first half", grown[0], None, " MB"),
        Figure("... in the second half", grown[1], 4, " MB"),
        Figure("left in queue and batch", left, 0),
    ]  # fmt: skip


def counted(load: Load) -> Load:
    """With codes that can be added, as JSON does not return them."""
    load.codes = Counter(load.codes)
    return load


def total_rss(server: Server) -> int:
    """Front and core, at rest."""
    settle(server)
    return rss(pid_of(server, "front")) + rss(pid_of(server, "core"))


Shares = tuple[int, int, float]  # tokens, requests, seconds until one was refused


class Tenant:
    """One who keeps asking.

    Args:
        asked: where all processes can see how often `few` has asked.
        new_tokens: of each answer.
    """

    def __init__(self, name: str, asked: mmap.mmap, new_tokens: int) -> None:
        self._metadata = [("x-tenant", name)]
        self._few_asked = asked
        self._new_tokens = new_tokens
        self.num_asked = 0
        self.num_tokens = 0
        self.refusals: list[float] = []  # seconds until each
        self.codes: Counter[str] = Counter()  # of those

    async def stream(self, stub: pb_grpc.GenerationServiceStub) -> None:
        """One stream after the other, as `few`."""
        while True:
            self.num_asked += 1
            self._few_asked[:8] = struct.pack("q", self.num_asked)
            had = 0
            call = stub.GenerateStream(single(self._new_tokens), metadata=self._metadata)
            try:
                async for message in call:
                    if message.generated_token_count:
                        self.num_tokens += message.generated_token_count - had
                        had = message.generated_token_count
            except grpc.aio.AioRpcError as error:  # the permit of the one before is not back yet
                self.codes[error.code().name] += 1
                await asyncio.sleep(0.01)

    async def flood(self, stub: pb_grpc.GenerationServiceStub) -> None:
        """`RATIO` requests for each of `few`; of most it is told at once that they are refused."""
        tasks: set[asyncio.Task[None]] = set()
        while True:
            (few,) = struct.unpack("q", self._few_asked[:8])
            while self.num_asked < RATIO * few and len(tasks) < AT_ONCE:
                self.num_asked += 1
                task = asyncio.create_task(self._ask(stub))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.005)

    async def _ask(self, stub: pb_grpc.GenerationServiceStub) -> None:
        start = time.monotonic()
        try:
            answer = await stub.Generate(batch(self._new_tokens), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
            self.refusals.append(time.monotonic() - start)
        else:
            self.num_tokens += answer.responses[0].generated_token_count

    async def keep_asking(self, address: str, streams: int, seconds: float) -> Shares:
        """What it got, but for the beginning; with no `streams` it floods."""
        with streaming(address) as stub:
            works = [self.stream(stub) for _ in range(streams)] or [self.flood(stub)]
            clients = [asyncio.create_task(work) for work in works]
            await asyncio.sleep(seconds / 6)
            before = self.num_tokens
            await asyncio.sleep(seconds * 5 / 6)
            got = self.num_tokens - before
            for task in clients:
                task.cancel()
            done = await asyncio.gather(*clients, return_exceptions=True)
            (fault,) = {*map(type, done)}
            assert fault is asyncio.CancelledError, done
            assert self.codes.keys() <= {*EXPECTED}, self.codes
            return got, self.num_asked, percentile(self.refusals or [0.0], 50)


def tenants(full: bool) -> list[Figure]:
    """Fair shares."""
    flags = [*FLAGS, "--fair-share-by", "x-tenant"]
    flags[1] = "64"
    seconds = 60.0 if full else 20.0
    with serving(*flags) as server, mmap.mmap(-1, 8) as asked:

        def client(name: str, streams: int) -> Shares:
            tenant = Tenant(name, asked, TENANT_TOKENS[full])
            return asyncio.run(tenant.keep_asking(server.grpc, streams, seconds))

        few, many = apart([lambda: client("few", FEW), lambda: client("many", 0)])
    percent = 100 * few[0] / (few[0] + many[0])
    return [
        Figure("requests of the tenant that asks more, for each of the other's",
               many[1] / few[1], None),
        Figure("... refused after, median", 1e3 * many[2], None, " ms"),
        Figure("tokens that the other one gets", percent, 45, " %", least=True, slack=1.2),
        Figure("... at most", percent, 55, " %", slack=1.2),
    ]  # fmt: skip


def measure(full: bool) -> list[Figure]:
    """See the module."""
    return [*overloaded(full), *tenants(full)]


PROMISE = Promise("overload", "ten times the load; two tenants at 100:1", measure)

if __name__ == "__main__":
    PROMISE.main()
