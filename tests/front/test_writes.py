"""Messages that do not leave: which connections end, and which do not."""

import asyncio
import socket

import grpc
import pytest
from tests.front.test_grpc_server import SINGLE, Service, running
from tests.kit import http2
from tests.kit.waiting import until

from tgis.front import grpc_server
from tgis.front.writes import Peer, peer_of, shut_down

GENERATE_STREAM = "/fmaas.GenerationService/GenerateStream"
GENERATE = "/fmaas.GenerationService/Generate"


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("ipv4:10.0.0.1:4711", ("10.0.0.1", 4711)),
        ("ipv6:%5B::1%5D:4711", ("::1", 4711)),
        ("ipv6:[fe80::1%25eth0]:4711", ("fe80::1", 4711)),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4711", ("10.0.0.1", 4711)),
        ("unix:/some/socket", None),
    ],
)
def test_peers_of_calls(text: str, peer: tuple[str, int] | None) -> None:
    assert peer_of(text) == peer


def test_only_the_connection_with_that_peer_is_shut_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(2)]
        servers = [listener.accept()[0] for _ in clients]
        shut_down({clients[0].getsockname()})
        assert clients[0].recv(1) == b""
        servers[1].sendall(b"x")
        assert clients[1].recv(1) == b"x"
        for sock in clients + servers:
            sock.close()


async def ended(sock: socket.socket) -> bool:
    """Whether the server has closed a connection, whatever it has sent before."""
    sock.settimeout(5)
    await asyncio.to_thread(lambda: [*http2.frames(sock)])
    return True


@pytest.mark.parametrize("path", [GENERATE, GENERATE_STREAM])
async def test_a_client_that_takes_nothing_loses_its_connection(path: str) -> None:
    now = [0.0]
    service = Service()
    async with running(service) as here:
        here.server.writes._clock = lambda: now[0]
        writes = here.server.writes
        service.gate.set()
        sock = await asyncio.to_thread(http2.connect, f"127.0.0.1:{here.port}", 0)
        message = SINGLE if path == GENERATE_STREAM else b"\x1a\x03\x12\x01a"
        await asyncio.to_thread(sock.sendall, http2.call(1, path, message))
        async with asyncio.timeout(10):
            await until(lambda: writes._writing)
        now[0] = writes._timeout - 1
        writes.check()
        now[0] = writes._timeout + 1
        assert [m.text async for m in here.stub.GenerateStream(SINGLE)]  # others are served
        writes.check()
        assert await ended(sock)
        async with asyncio.timeout(10):
            await until(lambda: not writes._writing)
        sock.close()


async def test_a_client_that_reads_is_left_alone() -> None:
    now = [0.0]
    cut: list[set[Peer]] = []
    service = Service()
    service.gate.clear()
    async with running(service) as here:
        here.server.writes._clock, here.server.writes._cut = lambda: now[0], cut.append
        call = here.stub.GenerateStream(SINGLE)
        assert (await call.read()).text == "a"
        await service.began.wait()
        now[0] = 1000.0
        here.server.writes.check()
        service.gate.set()
        while await call.read() is not grpc.aio.EOF:
            pass
    assert not cut


async def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_MOST_CONNECTIONS", 3)
    async with running(Service()) as here:
        address = f"127.0.0.1:{here.port}"
        open_ = [await asyncio.to_thread(http2.connect, address) for _ in range(3)]
        for sock in open_:  # the server has spoken, so the connection counts
            assert await asyncio.to_thread(sock.recv, 1)
        over = await asyncio.to_thread(http2.connect, address)
        assert await ended(over)
        for sock in [*open_, over]:
            sock.close()
