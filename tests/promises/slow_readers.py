"""Promise 5: clients that never read hold little, disturb nobody, and are ended."""

import asyncio
import socket
import time

from tests.kit import http2
from tests.kit.processes import wait_until
from tests.kit.server import Server

from tgis.proto import generation_pb2 as pb

from .figures import AT_LEISURE, ONLY_SHOWN, Figure, Promise, percentile
from .house import GENERATE_STREAM, gauge, pid_of, rss, serving, single, streaming

CLIENTS = 200
READERS = 8
WRITE_TIMEOUT = {True: 30.0, False: 6.0}


def greedy_of_memory() -> pb.SingleGenerationRequest:
    """A stream with as much to tell of each token as there is."""
    request = single(900)
    request.params.response.CopyFrom(
        pb.ResponseOptions(
            generated_tokens=True, token_logprobs=True, token_ranks=True, top_n_tokens=10
        )
    )
    return request


def stall(server: Server, count: int = CLIENTS) -> list[socket.socket]:
    """Clients that open a stream and read nothing of it."""
    call = http2.call(1, GENERATE_STREAM, greedy_of_memory())
    clients = [http2.connect(server.grpc, 0) for _ in range(count)]
    for client in clients:
        client.sendall(call)
    return clients


async def gaps(address: str, seconds: float) -> list[float]:
    """Seconds between the tokens of some streams that are read."""
    found: list[float] = []
    end = time.monotonic() + seconds
    with streaming(address) as stub:

        async def read() -> None:
            while time.monotonic() < end:
                last = 0.0
                async for message in stub.GenerateStream(single(200)):
                    now = time.monotonic()
                    if last and message.generated_token_count > 1:
                        found.append(now - last)
                    last = now

        await asyncio.gather(*(read() for _ in range(READERS)))
    return found


def ended(clients: list[socket.socket]) -> int:
    """How many connections the server has closed."""
    count = 0
    for client in clients:
        client.setblocking(False)
        try:
            while client.recv(1 << 16):
                pass
            count += 1
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


def wait_running(server: Server, count: int) -> None:
    """Until so many sequences hold memory."""
    wait_until(lambda: gauge(server, "tgi_batch_current_size") >= count)


def measure(full: bool) -> list[Figure]:
    """See the module."""
    timeout = WRITE_TIMEOUT[full]
    flags = ("--write-timeout", str(timeout), "--max-batch-size", str(CLIENTS + READERS))
    with serving(*flags) as server:
        front = pid_of(server, "front")
        # A few of them first, for all that is there once, however many there are.
        warm_up = stall(server, CLIENTS // 20)
        asyncio.run(gaps(server.grpc, 2))
        wait_until(lambda: not gauge(server, "tgi_batch_current_size"), timeout * 2 + 10)
        quiet = asyncio.run(gaps(server.grpc, timeout / 3))
        memory = rss(front)
        clients = stall(server)
        start = time.monotonic()
        wait_running(server, CLIENTS)
        time.sleep(1.0)  # until all are held
        held = (rss(front) - memory) / CLIENTS
        beside = asyncio.run(gaps(server.grpc, timeout / 3))
        most = (rss(front) - memory) / CLIENTS
        wait_until(lambda: not gauge(server, "tgi_batch_current_size"), 90)
        stalled = time.monotonic() - start
        time.sleep(0.5)
        num_ended = ended(clients)
        for client in (*warm_up, *clients):
            client.close()
        quiet += asyncio.run(gaps(server.grpc, timeout / 3))
    change = 100 * (percentile(beside, 99) / percentile(quiet, 99) - 1)
    return [
        Figure("held for each stream that is not read", held / 1024, 64, " KiB"),
        Figure("... with all that the front took beside them later", most / 1024, None, " KiB"),
        Figure("other streams' p99 inter-token latency", percentile(quiet, 99) * 1e3, None, " ms"),
        Figure(f"... changes beside {CLIENTS} stalled streams by", change, 10, " %",
               slack=ONLY_SHOWN),
        Figure(f"stalled streams ended after (--write-timeout {timeout:g})", stalled,
               timeout * 1.25 + 3, " s", slack=AT_LEISURE),
        Figure(f"connections of {CLIENTS} that were ended", num_ended, CLIENTS, least=True),
    ]  # fmt: skip


PROMISE = Promise("slow_readers", "200 clients that open a stream and never read", measure)

if __name__ == "__main__":
    PROMISE.main()
