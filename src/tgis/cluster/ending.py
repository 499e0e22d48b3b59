"""How a call ended, as the last message that a replica sends to the proxy.

Serve carries status and metadata with messages only, hence none that is known after the last one,
and says INTERNAL when a replica is lost. So a replica tells by a message of its own how each call
ended, and a call without one has lost its replica.
"""

from typing import Any

import msgspec

from tgis.cluster.affinity import MARK


class Ending(msgspec.Struct, frozen=True, array_like=True):
    """What follows the messages of a call, and the message of a unary one."""

    code: int  # of gRPC
    details: str
    trailers: list[tuple[str, Any]]  # text, or bytes
    message: bytes = b""


def encode(ending: Ending) -> bytes:
    """An ending as a message; none of ours begins like it."""
    return MARK + msgspec.msgpack.encode(ending)


def decode(message: bytes) -> Ending | None:
    """The ending in a message; None if it is an ordinary one."""
    if not message.startswith(MARK):
        return None
    return msgspec.msgpack.decode(message[len(MARK) :], type=Ending)
