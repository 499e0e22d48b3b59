"""Promise 8: hostile clients break nothing, hold little, and disturb others little.

Attackers have machines of their own; here they share the server's, and so stand back for it
(`nice`): what others notice is what the server does, not what the attackers compute.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import grpc
from tests.fuzz import wire
from tests.kit import http2
from tests.kit.server import Server

from .figures import ONLY_SHOWN, Figure, Promise, percentile
from .house import GENERATE_STREAM, apart, pid_of, rss, serving, single, streaming

Attack = Callable[[Server, threading.Event, random.Random], int]  # returns how often
FLAGS = ("--max-message-bytes", "4MiB", "--max-new-tokens", "20", "--log-level", "error")
READERS = 4
FRONT_MB = 64  # that the front may grow by, attack by attack
# The same for all at the same time. 11,500 calls wait or are answered then, at 20 KB each, beside
# 2,000 connections; after four rounds of them nothing comes to it any more.
ALL_MB = 384
FUZZERS = 2  # messages at a time
NICE = 19


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """A raw HTTP/2 connection; that the server ends it is its right."""
    with (
        contextlib.suppress(OSError, EOFError),
        http2.connect(server.grpc) as sock,
    ):
        sock.settimeout(2)
        yield sock


def fuzzed_protobufs(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Damaged and hostile messages."""
    count = 0

    async def run() -> None:
        nonlocal count
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            while not done.is_set():
                found = await wire.run(channel, 50, rng.randrange(1 << 30), FUZZERS)
                count += sum(found.values())

    asyncio.run(run())
    return count


def ordinary(server: Server, done: threading.Event, rng: random.Random) -> int:
    """No attack: many of the fuzzer's messages are good ones too, and are computed."""
    count = 0

    async def client() -> None:
        nonlocal count
        with streaming(server.grpc) as stub:
            while not done.is_set():
                async for _ in stub.GenerateStream(single(20)):
                    pass
                count += 1

    async def run() -> None:
        await asyncio.gather(*(client() for _ in range(FUZZERS)))

    asyncio.run(run())
    return count


def oversized(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Messages and metadata beyond all limits."""
    count = 0
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/fmaas.GenerationService/Generate")
        while not done.is_set():
            with contextlib.suppress(grpc.RpcError):
                call(bytes(rng.choice([5, 16, 63]) << 20), timeout=10)
            with contextlib.suppress(grpc.RpcError):
                call(b"", metadata=[("x-long", "a" * rng.choice([9_000, 60_000]))], timeout=10)
            with connected(server) as sock:
                sock.sendall(http2.frame(http2.HEADERS, 0, 1, http2.call_headers(GENERATE_STREAM)))
                for _ in range(500):  # headers without end
                    block = http2.header(b"x-%d" % rng.randrange(9), b"a" * 1000)
                    sock.sendall(http2.frame(http2.CONTINUATION, 0, 1, block))
            count += 3
    return count


def rapid_reset(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Calls that are cancelled in the same breath (CVE-2023-44487)."""
    request, count = single(50), 0
    while not done.is_set():
        with connected(server) as sock:
            for stream in range(1, 2001, 2):
                cancel = http2.frame(http2.RST_STREAM, 0, stream, struct.pack(">I", http2.CANCEL))
                sock.sendall(http2.call(stream, GENERATE_STREAM, request) + cancel)
                count += 1
        done.wait(0.05)
    return count


def floods(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Pings, settings, empty frames and priorities by the thousand; no answer is read."""
    kinds = [
        http2.frame(http2.PING, 0, 0, bytes(8)),
        http2.settings({1: 4096}),
        http2.frame(http2.PRIORITY, 0, 1, bytes(5)),
        http2.frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        http2.frame(http2.DATA, 0, 1),
        http2.frame(rng.randrange(256), rng.randrange(256), rng.randrange(9), rng.randbytes(20)),
    ]
    count = 0
    while not done.is_set():
        with connected(server) as sock:
            for _ in range(50):
                sock.sendall(rng.choice(kinds) * 100)
                count += 100
        done.wait(0.05)
    return count


def noise(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Bytes of no protocol, on both ports."""
    ports, count = (server.grpc, server.http.removeprefix("http://")), 0
    while not done.is_set():
        host, _, port = rng.choice(ports).rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 2) as sock:
            sock.sendall(rng.randbytes(rng.randrange(1, 4000)))
            count += 1
        done.wait(0.005)
    return count


def idle_connections(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Connections that say nothing, on both ports."""
    idle = []
    for address in (server.grpc, server.http.removeprefix("http://")):
        host, _, port = address.rpartition(":")
        for _ in range(1000):
            with contextlib.suppress(OSError):
                idle.append(socket.create_connection((host, int(port)), 2))
    done.wait()
    for sock in idle:
        sock.close()
    return len(idle)


MALFORMED = [
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 5000 + b"\r\n",
    b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /health HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"a" * 1000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


def malformed_http(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Requests that are none, on the metrics port."""
    host, _, port = server.http.removeprefix("http://").rpartition(":")
    count = 0
    while not done.is_set():
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 2) as sock:
            sock.sendall(rng.choice(MALFORMED))
            count += 1
            sock.settimeout(0.2)
            sock.recv(1000)
        done.wait(0.002)
    return count


def slowloris(server: Server, done: threading.Event, rng: random.Random) -> int:
    """Requests on the metrics port that come in byte by byte, and answers that nobody reads."""
    host, _, port = server.http.removeprefix("http://").rpartition(":")
    slow: list[socket.socket] = []
    while not done.wait(0.2):
        with contextlib.suppress(OSError):
            slow.append(socket.create_connection((host, int(port)), 2))
            slow[-1].sendall(b"GET /health HTTP/1.1\r\nHost: ")
            slow.append(socket.create_connection((host, int(port)), 2))
            slow[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        for sock in slow:
            with contextlib.suppress(OSError):
                sock.sendall(b"a")
    for sock in slow:
        sock.close()
    return len(slow)


ATTACKS: list[Attack] = [
    fuzzed_protobufs,
    oversized,
    rapid_reset,
    floods,
    noise,
    idle_connections,
    malformed_http,
    slowloris,
]


async def calls(address: str, seconds: float) -> tuple[list[float], dict[str, int]]:
    """Seconds that requests of other clients take, and how often they end in another way."""
    took: list[float] = []
    failed: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with streaming(address) as stub:

        async def client() -> None:
            while (start := time.monotonic()) < end:
                try:
                    async for _ in stub.GenerateStream(single(20)):
                        pass
                    took.append(time.monotonic() - start)
                except grpc.aio.AioRpcError as error:
                    failed[error.code().name] += 1

        await asyncio.gather(*(client() for _ in range(READERS)))
    return took, failed


def attacking(server: Server, attack: Attack, seconds: float) -> int:
    """One attack for so long; how often."""
    done = threading.Event()
    threading.Timer(seconds, done.set).start()
    return attack(server, done, random.Random(0))


@dataclass(frozen=True)
class Found:
    """How others fared beside attacks."""

    num_attacks: int
    p99: float  # seconds that their calls took
    failed: int  # of their calls, and of health checks
    refused: int  # for want of permits: whoever takes all of them takes them from others


def attacked(server: Server, attacks: list[Attack], seconds: float) -> Found:
    """Calls of others, and beside them the attacks, each in a process of its own."""

    def others() -> tuple[list[float], dict[str, int]]:
        time.sleep(0.5)
        return asyncio.run(calls(server.grpc, seconds - 1))

    def against(attack: Attack) -> Callable[[], int]:
        return lambda: attacking(server, attack, seconds)

    (took, failed), *counts = apart([others, *map(against, attacks)], [0, *[NICE] * len(attacks)])
    names = ", ".join(attack.__name__ for attack in attacks) or "nobody"
    print(f"  {names}: {len(took)} calls of others, {failed}", flush=True)
    refused = failed.pop(grpc.StatusCode.RESOURCE_EXHAUSTED.name, 0)
    healthy = server.get("/health", timeout=5)[0] == 200
    lost = sum(failed.values()) + (not healthy)
    return Found(sum(counts), percentile(took, 99), lost, refused)


def measure(full: bool) -> list[Figure]:
    """See the module."""
    seconds = 16.0 if full else 3.0
    figures = []
    with serving(*FLAGS) as server:
        pids = {name: pid_of(server, name) for name in ("front", "core")}
        base = attacked(server, [], seconds).p99
        company = attacked(server, [ordinary], seconds).p99
        figures += [
            Figure("p99 of a short stream, nobody attacks", base * 1e3, None, " ms"),
            Figure(f"... beside {FUZZERS} more such clients", company * 1e3, None, " ms"),
        ]
        memory = [rss(pids["front"])]
        for attack in ATTACKS:
            found = attacked(server, [attack], seconds)
            name = attack.__name__.replace("_", " ")
            is_fuzz = attack is fuzzed_protobufs
            change = found.p99 / (company if is_fuzz else base) - 1
            figures += [
                Figure(f"{name}, in {seconds:.0f} s", found.num_attacks, None),
                Figure("... p99 of others changes by" + is_fuzz * ", from that beside such clients",
                       100 * change, 20, " %", slack=ONLY_SHOWN),
                Figure("... others' calls that failed, health checks too", found.failed, 0),
            ]  # fmt: skip
        memory.append(rss(pids["front"]))
        for _ in range(2):
            found = attacked(server, ATTACKS[1:], seconds)
            memory.append(rss(pids["front"]))
        lost = sum(pid != pid_of(server, name) for name, pid in pids.items())
    grown = [(after - before) / 2**20 for before, after in pairwise(memory)]
    return [
        *figures,
        Figure("all but the first at the same time, twice", found.num_attacks, None),
        Figure("... others' calls that failed, health checks too", found.failed, None),
        Figure(
            "growth of the front's memory, one after the other",
            grown[0],
            FRONT_MB,
            " MB",
            slack=1.5,
        ),
        Figure("... then all at the same time, twice", sum(grown[1:]), ALL_MB, " MB"),
        Figure("processes lost", lost, 0),
    ]


PROMISE = Promise("hostile_wire", "hostile clients on both ports", measure)

if __name__ == "__main__":
    PROMISE.main()
