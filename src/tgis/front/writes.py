"""Messages on their way to clients, and the end of clients that do not take them.

gRPC takes the next message of a stream only when the one before has left, which flow control may
hold up for ever. It has no way to end such a call: a status would have to wait behind the message.
So a connection on which a message has waited for the write timeout is shut down, and gRPC cancels
its calls as it does when a client goes. Clients that read slowly, but read, keep theirs.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import AsyncIterable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Peer = tuple[str, int]  # address and port

_LOOKS = 8  # in one timeout


def shut_down(peers: set[Peer]) -> None:
    """Shut this process's TCP connections with these peers down."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if str(link.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as sock:
                    if _far_end(sock) in peers:
                        sock.shutdown(socket.SHUT_RDWR)


def _far_end(sock: socket.socket) -> Peer | None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    host, port = sock.getpeername()[:2]
    return _plain(host), port


class Writes:
    """All messages that have been handed to gRPC and not yet left.

    Args:
        timeout: seconds that a client may take for one message.
        clock: CLOCK_MONOTONIC seconds.
        cut: shuts the connections to these peers down.
    """

    def __init__(
        self,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        cut: Callable[[set[Peer]], None] = shut_down,
    ) -> None:
        self._timeout = timeout
        self._clock = clock
        self._cut = cut
        self._writing: dict[Context, float] = {}  # since when

    async def stream(self, context: Context, messages: AsyncIterable[Any]) -> None:
        """Write all messages of a call, each when the one before has left.

        Raises:
            CancelledError: the connection is gone, say because a message was late.
        """
        writing, clock = self._writing, self._clock
        try:
            async for message in messages:
                writing[context] = clock()
                await context.write(message)
                del writing[context]
        except grpc.aio.InternalError:  # the message cannot leave any more
            raise asyncio.CancelledError from None
        finally:
            writing.pop(context, None)

    def leave(self, context: Context) -> None:
        """The handler of a call ends now; gRPC still has to send what is left."""
        self._writing[context] = self._clock()
        context.add_done_callback(self._left)  # type: ignore[arg-type]  # is given the context

    def _left(self, context: Context) -> None:
        self._writing.pop(context, None)

    async def watch(self) -> None:
        """Look after late messages, for ever."""
        while True:
            await asyncio.sleep(self._timeout / _LOOKS)
            self.check()

    def check(self) -> None:
        """End the connections on which a message is late."""
        latest = self._clock() - self._timeout
        late = [context for context, since in self._writing.items() if since < latest]
        if late:
            self._cut({peer for context in late if (peer := peer_of(context.peer())) is not None})


def peer_of(text: str) -> Peer | None:
    """The other end of a call's connection, from gRPC's spelling such as `ipv4:10.0.0.1:4711`."""
    family, _, rest = unquote(text).partition(":")
    if family not in ("ipv4", "ipv6"):
        return None
    host, _, port = rest.rpartition(":")
    return _plain(host.strip("[]")), int(port)


def _plain(host: str) -> str:
    """An address in its canonical spelling; IPv4 that is dressed as IPv6 is undressed."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
