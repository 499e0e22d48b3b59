"""HTTP/2 by hand: clients that do what no gRPC library would do.

Frames (RFC 9113) are written as they are meant to be, right or wrong; headers are plain literals of
HPACK (RFC 7541), which needs no tables.
"""

import socket
import struct
from collections.abc import Iterator

from google.protobuf.message import Message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4  # a setting
CANCEL = 8  # an error code


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *item) for item in values.items()))


def _integer(value: int) -> bytes:
    """A length of HPACK, without Huffman coding."""
    if value < 127:
        return bytes([value])
    out = bytearray([127])
    value -= 127
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def header(name: bytes, value: bytes) -> bytes:
    """One header, as a literal that no table remembers."""
    return b"\0" + _integer(len(name)) + name + _integer(len(value)) + value


def call_headers(path: str, extra: dict[str, str] | None = None) -> bytes:
    """The header block of a gRPC call."""
    pairs = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    } | (extra or {})
    return b"".join(header(name.encode(), value.encode()) for name, value in pairs.items())


def call(stream: int, path: str, message: Message | bytes) -> bytes:
    """A whole gRPC call with one message."""
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return frame(HEADERS, END_HEADERS, stream, call_headers(path)) + frame(
        DATA, END_STREAM, stream, struct.pack(">BI", 0, len(body)) + body
    )


def connect(address: str, window: int = 65535) -> socket.socket:
    """A connection on which the client has spoken first, and read nothing.

    Args:
        window: bytes of each stream that the client is ready to take.
    """
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.sendall(PREFACE + settings({INITIAL_WINDOW_SIZE: window}))
    return sock


def frames(sock: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and body of every frame, until the other side closes."""
    data = b""
    while True:
        while len(data) < 9 or len(data) < 9 + int.from_bytes(data[:3]):
            try:
                more = sock.recv(1 << 16)
            except ConnectionResetError:
                return
            if not more:
                return
            data += more
        length = int.from_bytes(data[:3])
        kind, flags, stream = struct.unpack(">BBI", data[3:9])
        yield kind, flags, stream, data[9 : 9 + length]
        data = data[9 + length :]


def reset(sock: socket.socket) -> None:
    """Close with RST, as a process does that is killed with data unread."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
