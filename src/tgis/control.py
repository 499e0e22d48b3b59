"""What the supervisor and its children say to each other.

A child is started as a fresh interpreter with one end of a socket pair. It reads `Boot`, reports
as it goes, and treats the end of the file as the death of the supervisor: it exits at once, so
that nothing is ever left behind.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
from typing import Generic, TypeVar

import msgspec

from tgis.config import Config
from tgis.types import ModelFiles, ModelInfo
from tgis.wire import Decoder, frame

LAST_WORDS_SECONDS = 0.3  # for a hung process to say where its threads are
_STACKS_SIGNAL = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Boot(msgspec.Struct, frozen=True, tag=1):
    """Everything that a child needs to know."""

    config: Config
    files: ModelFiles
    tokenizer_path: str  # directory with tokenizer.json
    socket_path: str  # where front and core meet
    draft: ModelFiles | None = None  # a small model that drafts for this one


class Drain(msgspec.Struct, frozen=True, tag=2):
    """To the front: take no new requests, finish the open ones, exit."""


class Alive(msgspec.Struct, frozen=True, tag=3):
    """The child's process runs; `busy_for` is the age in seconds of the step under way."""

    busy_for: float = 0.0


class Loaded(msgspec.Struct, frozen=True, tag=4):
    """From the core: the model is in memory."""


class Serving(msgspec.Struct, frozen=True, tag=5):
    """From the front: requests are answered from now on."""

    model: ModelInfo
    grpc_port: int
    http_port: int


class Fatal(msgspec.Struct, frozen=True, tag=6):
    """The child cannot go on and a new one could not either: one line for the operator."""

    message: str
    exit_code: int


ToChild = Boot | Drain
ToSupervisor = Alive | Loaded | Serving | Fatal

T = TypeVar("T")


class Channel(Generic[T]):
    """One end of the socket pair.

    Args:
        union: the messages that this end receives.
    """

    def __init__(self, sock: socket.socket, union: object) -> None:
        self.sock = sock
        self._decoder: Decoder[T] = Decoder(union)

    def fileno(self) -> int:
        """For selectors."""
        return self.sock.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Send one message.

        Raises:
            OSError: the other end is gone.
        """
        self.sock.sendall(frame(message))

    def receive(self) -> list[T] | None:
        """Read once, blocking as the socket does; None at the end of the file."""
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        return self._decoder.feed(data) if data else None


def how_ended(code: int) -> str:
    """A process's return code in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def adopt_orphans() -> None:
    """From now on the children of this process's dead children are its own."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def ask_for_stacks(pid: int) -> None:
    """Let a child write on its stderr where each of its threads is, also if it is stopped.

    It answers from a signal handler in C, within milliseconds, whatever Python does meanwhile.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)  # a stopped process handles no signal


def die_with_parent() -> None:
    """From now on this process is killed when the thread that has started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def open_child() -> tuple[Channel[ToChild], Boot]:
    """In a child: the channel given as file descriptor in `sys.argv[1]`, and its first message.

    Exits if the supervisor is gone already.
    """
    die_with_parent()
    faulthandler.register(_STACKS_SIGNAL, all_threads=True)
    channel: Channel[ToChild] = Channel(socket.socket(fileno=int(sys.argv[1])), ToChild)
    while (messages := channel.receive()) is not None:
        for message in messages:
            if isinstance(message, Boot):
                return channel, message
    sys.exit(1)
