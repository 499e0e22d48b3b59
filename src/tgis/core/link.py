"""The core's end of the Unix socket: fronts connect, speak `wire`, and are never waited for."""

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from tgis.wire import Decoder, ToCore, ToFront, encode

_READ_BYTES = 1 << 18


class Gone:
    """A front's connection has ended."""


GONE = Gone()
_WAKER = -1  # what the selector knows the bell by; clients count from 0


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.decoder: Decoder[ToCore] = Decoder(ToCore)
        self.unsent = bytearray()


class FrontLink:
    """Listens on `path` (mode 0600) and serves any number of fronts.

    Sending never blocks: what the socket does not take at once is kept and sent later. The
    heartbeat thread sends too, hence the lock.
    """

    def __init__(self, path: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        self._next_client = 0
        self._lock = threading.Lock()
        self._greeting: bytes = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        path.unlink(missing_ok=True)
        old_umask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(old_umask)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, _WAKER)

    def wake(self) -> None:
        """Let `receive` return, from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):  # it is rung already, or closed
            self._ringer.send(b".")

    def is_connected(self, client: int) -> bool:
        """Whether a front is still there."""
        return client in self._connections

    def greet(self, message: ToFront) -> None:
        """Tell every front now, and every front that connects later before anything else."""
        with self._lock:
            self._greeting = encode(message)
        self.broadcast(message)

    def broadcast(self, message: ToFront) -> None:
        """Send to every front."""
        frame = encode(message)
        for client in tuple(self._connections):
            self._write(client, frame)

    def send(self, client: int, message: ToFront) -> None:
        """Send to one front; nothing happens if it is gone."""
        self._write(client, encode(message))

    def receive(self, wait: float) -> Iterator[tuple[int, ToCore | Gone]]:
        """Yield what the fronts have said, waiting up to `wait` seconds for the first word."""
        for key, events in self._selector.select(wait):
            client: int | None = key.data
            if client is None:
                self._accept()
                continue
            if client == _WAKER:
                self._bell.recv(_READ_BYTES)
                continue
            if events & selectors.EVENT_WRITE:
                self._write(client, b"")
            if events & selectors.EVENT_READ:
                yield from ((client, message) for message in self._read(client))

    def close(self) -> None:
        """Close every socket."""
        for client in tuple(self._connections):
            self._drop(client)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._selector.unregister(self._bell)
        self._bell.close()
        self._ringer.close()
        self._selector.close()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        client = self._next_client
        self._next_client += 1
        with self._lock:
            self._connections[client] = _Connection(sock)
            self._selector.register(sock, selectors.EVENT_READ, client)
            greeting = self._greeting
        self._write(client, greeting)

    def _read(self, client: int) -> list[ToCore | Gone]:
        connection = self._connections.get(client)
        if connection is None:
            return []
        try:
            data = connection.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return [GONE]
        return list(connection.decoder.feed(data))

    def _write(self, client: int, frame: bytes) -> None:
        with self._lock:
            connection = self._connections.get(client)
            if connection is None:
                return
            connection.unsent += frame
            # A broken pipe shows up as end of file on the next read.
            with contextlib.suppress(BlockingIOError, OSError):
                while connection.unsent:
                    sent = connection.sock.send(connection.unsent)
                    del connection.unsent[:sent]
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
            if self._selector.get_key(connection.sock).events != events:
                self._selector.modify(connection.sock, events, client)

    def _drop(self, client: int) -> None:
        with self._lock:
            connection = self._connections.pop(client)
            self._selector.unregister(connection.sock)
            connection.sock.close()
