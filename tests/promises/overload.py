"""Promise 6: ten times the load changes little of what is done; tenants get equal shares."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
from tests.kit.server import Server

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

from .figures import Figure, Promise, percentile
from .house import batch, gauge, pid_of, rss, serving, streaming

PERMITS = 32
NEW_TOKENS = 96
TIMES = 10
FLAGS = ("--max-concurrent-requests", str(PERMITS), "--max-batch-size", "16", "--no-log-prompts",
         "--log-level", "warning", "--prefix-caching", "false")  # fmt: skip


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


async def ask(stub: pb_grpc.GenerationServiceStub, load: Load, metadata: object = None) -> bool:
    """One request; whether it was answered."""
    start = time.monotonic()
    try:
        answer = await stub.Generate(REQUEST, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        load.codes[error.code().name] += 1
        load.refusals.append(time.monotonic() - start)
        return False
    load.codes["OK"] += 1
    load.tokens += answer.responses[0].generated_token_count
    return True


REQUEST: pb.BatchedGenerationRequest = batch(NEW_TOKENS)


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


def overloaded(full: bool) -> list[Figure]:
    """Peak, then ten times the requests."""
    seconds = 180.0 if full else 9.0
    with serving(*FLAGS) as server:
        asyncio.run(peak(server.grpc, 3))
        best = asyncio.run(peak(server.grpc, seconds / 6))
        rate = TIMES * best.goodput / NEW_TOKENS
        asyncio.run(flood(server.grpc, rate, seconds / 12))
        memory = total_rss(server)
        load = asyncio.run(flood(server.grpc, rate, seconds))
        growth = total_rss(server) - memory
        unexpected = sum(n for code, n in load.codes.items() if code not in EXPECTED)
        left = gauge(server, "tgi_queue_size") + gauge(server, "tgi_batch_current_size")
    refused = [1e3 * seconds for seconds in load.refusals]
    return [
        Figure("peak", best.goodput, None, " tokens/s"),
        Figure(f"requests offered, times the peak's ({rate:.0f}/s)", TIMES, None),
        Figure("goodput under it, of the peak's", 100 * load.goodput / best.goodput, 90, " %",
               least=True, steady=False),
        Figure("refused", 100 * len(refused) / sum(load.codes.values()), None, " %"),
        Figure("refused after, median", percentile(refused, 50), 20, " ms", steady=False),
        Figure("refused after, p99, with the client's own time", percentile(refused, 99), None,
               " ms"),
        Figure("answers other than OK and RESOURCE_EXHAUSTED", unexpected, 0),
        Figure("growth of memory", growth / 2**20, 8, " MB", steady=False),
        Figure("left in queue and batch", left, 0),
    ]  # fmt: skip


EXPECTED = ("OK", "RESOURCE_EXHAUSTED")


def total_rss(server: Server) -> int:
    """Front and core."""
    return rss(pid_of(server, "front")) + rss(pid_of(server, "core"))


async def share(address: str, seconds: float) -> dict[str, tuple[int, int]]:
    """Tokens and requests of two tenants: one always has some open, the other asks 100 times."""
    loads = {"few": Load(), "many": Load()}
    end = time.monotonic() + seconds
    with streaming(address) as few, streaming(address) as many:

        async def patient() -> None:
            while time.monotonic() < end:
                if not await ask(few, loads["few"], [("x-tenant", "few")]):
                    await asyncio.sleep(0.05)

        async def impatient() -> None:
            while time.monotonic() < end:
                asked = sum(loads["many"].codes.values())
                behind = 100 * (sum(loads["few"].codes.values()) + 1) - asked
                if behind <= 0:
                    await asyncio.sleep(0.01)
                elif not await ask(many, loads["many"], [("x-tenant", "many")]):
                    await asyncio.sleep(0.02)

        await asyncio.gather(*(patient() for _ in range(20)), *(impatient() for _ in range(64)))
    return {name: (load.tokens, sum(load.codes.values())) for name, load in loads.items()}


def tenants(full: bool) -> list[Figure]:
    """Fair shares."""
    flags = [*FLAGS, "--fair-share-by", "x-tenant"]
    flags[1] = "64"
    with serving(*flags) as server:
        asyncio.run(share(server.grpc, 3))
        shares = asyncio.run(share(server.grpc, 120.0 if full else 10.0))
    (few, few_asked), (many, many_asked) = shares["few"], shares["many"]
    percent = 100 * few / (few + many)
    return [
        Figure("requests of the tenant that asks more, for each of the other's",
               many_asked / few_asked, None),
        Figure("tokens that the other one gets", percent, 45, " %", least=True),
        Figure("... at most", percent, 55, " %"),
    ]  # fmt: skip


def measure(full: bool) -> list[Figure]:
    """See the module."""
    return [*overloaded(full), *tenants(full)]


PROMISE = Promise("overload", "ten times the load; two tenants at 100:1", measure)

if __name__ == "__main__":
    PROMISE.main()
