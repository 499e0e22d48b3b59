"""Promise 8: hostile clients break nothing, hold little, and disturb others little."""

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from tests.fuzz import wire
from tests.kit import http2
from tests.kit.server import Server

from .figures import Figure, Promise, percentile
from .house import GENERATE_STREAM, pid_of, rss, serving, single, streaming

Attack = Callable[[Server, threading.Event, random.Random], None]
READERS = 4
FRONT_BYTES = 64 << 20  # that the front may grow by, all attacks together


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """A raw HTTP/2 connection; that the server ends it is its right."""
    with (
        contextlib.suppress(OSError, EOFError),
        http2.connect(server.grpc) as sock,
    ):
        sock.settimeout(2)
        yield sock


def fuzzed_protobufs(server: Server, done: threading.Event, rng: random.Random) -> None:
    """Damaged and hostile messages."""

    async def run() -> None:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            while not done.is_set():
                await wire.run(channel, 200, rng.randrange(1 << 30), 4)

    asyncio.run(run())


def oversized(server: Server, done: threading.Event, rng: random.Random) -> None:
    """Messages and metadata beyond all limits."""
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


def rapid_reset(server: Server, done: threading.Event, rng: random.Random) -> None:
    """Calls that are cancelled in the same breath (CVE-2023-44487)."""
    request = single(50)
    while not done.is_set():
        with connected(server) as sock:
            for stream in range(1, 2001, 2):
                cancel = http2.frame(http2.RST_STREAM, 0, stream, struct.pack(">I", http2.CANCEL))
                sock.sendall(http2.call(stream, GENERATE_STREAM, request) + cancel)
        done.wait(0.05)


def floods(server: Server, done: threading.Event, rng: random.Random) -> None:
    """Pings, settings, empty frames and priorities by the thousand; no answer is read."""
    kinds = [
        http2.frame(http2.PING, 0, 0, bytes(8)),
        http2.settings({1: 4096}),
        http2.frame(http2.PRIORITY, 0, 1, bytes(5)),
        http2.frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        http2.frame(http2.DATA, 0, 1),
        http2.frame(rng.randrange(256), rng.randrange(256), rng.randrange(9), rng.randbytes(20)),
    ]
    while not done.is_set():
        with connected(server) as sock:
            for _ in range(50):
                sock.sendall(rng.choice(kinds) * 100)
        done.wait(0.05)


def noise(server: Server, done: threading.Event, rng: random.Random) -> None:
    """Bytes of no protocol, on both ports."""
    ports = (server.grpc, server.http.removeprefix("http://"))
    while not done.is_set():
        host, _, port = rng.choice(ports).rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 2) as sock:
            sock.sendall(rng.randbytes(rng.randrange(1, 4000)))
        done.wait(0.005)


def idle_connections(server: Server, done: threading.Event, rng: random.Random) -> None:
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


def malformed_http(server: Server, done: threading.Event, rng: random.Random) -> None:
    """Requests that are none, on the metrics port."""
    host, _, port = server.http.removeprefix("http://").rpartition(":")
    while not done.is_set():
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 2) as sock:
            sock.sendall(rng.choice(MALFORMED))
            sock.settimeout(0.2)
            sock.recv(1000)
        done.wait(0.002)


def slowloris(server: Server, done: threading.Event, rng: random.Random) -> None:
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


async def calls(address: str, seconds: float) -> tuple[list[float], int]:
    """Seconds that requests of other clients take, and how many fail."""
    took: list[float] = []
    failed = 0
    end = time.monotonic() + seconds
    with streaming(address) as stub:

        async def client() -> None:
            nonlocal failed
            while (start := time.monotonic()) < end:
                try:
                    async for _ in stub.GenerateStream(single(20)):
                        pass
                    took.append(time.monotonic() - start)
                except grpc.aio.AioRpcError as error:
                    # Whoever takes all the permits takes them from others: that is overload.
                    failed += error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED

        await asyncio.gather(*(client() for _ in range(READERS)))
    return took, failed


def attacked(server: Server, attack: Attack, seconds: float) -> tuple[list[float], int]:
    """The same while an attack goes on, from a process of its own."""
    done = threading.Event()
    child = os.fork()
    if child == 0:  # no gRPC has been used in this process yet
        threading.Timer(seconds + 1.0, done.set).start()
        try:
            attack(server, done, random.Random(0))
        finally:
            os._exit(0)
    try:
        time.sleep(0.5)
        return asyncio.run(calls(server.grpc, seconds))
    finally:
        os.waitpid(child, 0)


def measure(full: bool) -> list[Figure]:
    """See the module."""
    seconds = 20.0 if full else 2.0
    figures = []
    with serving("--max-message-bytes", "4MiB", "--log-level", "error") as server:
        front, core = pid_of(server, "front"), pid_of(server, "core")
        quiet, _ = in_child(lambda: asyncio.run(calls(server.grpc, seconds)))
        before = rss(front)
        base = percentile(quiet, 99)
        figures.append(Figure("p99 of a short stream, nobody attacks", base * 1e3, None, " ms"))
        for attack in ATTACKS:
            took, failed = in_child(lambda attack=attack: attacked(server, attack, seconds))
            healthy = server.get("/health", timeout=5)[0] == 200
            name = attack.__name__.replace("_", " ")
            change = 100 * (percentile(took, 99) / base - 1)
            figures += [
                Figure(f"{name}: p99 of others changes by", change, 20, " %", steady=False),
                Figure(f"{name}: others' calls that failed, health checks too",
                       failed + (not healthy), 0),
            ]  # fmt: skip
        figures += [
            Figure("growth of the front's memory", (rss(front) - before) / 2**20,
                   FRONT_BYTES >> 20, " MB", steady=False),
            Figure("processes lost", [front, core] != [pid_of(server, name)
                                                       for name in ("front", "core")], 0),
        ]  # fmt: skip
    return figures


def in_child(work: Callable[[], tuple[list[float], int]]) -> tuple[list[float], int]:
    """Run something that uses gRPC in a process of its own, so that this one can fork again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            took, failed = work()
            os.write(writer, struct.pack(f"<i{len(took)}f", failed, *took)[:60_000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    failed, *took = struct.unpack(f"<i{(len(data) - 4) // 4}f", data)
    return list(took), failed


PROMISE = Promise("hostile_wire", "hostile clients on both ports", measure)

if __name__ == "__main__":
    PROMISE.main()
