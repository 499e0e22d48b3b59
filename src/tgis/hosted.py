"""A server of one's own: an ordinary server in a process of its own, which ends with its owner.

What runs many replicas, or a batch of prompts, is a client of such servers. So there is one way to
serve, and whatever a server does about dead cores, deadlines and memory holds here too.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO

import msgspec

from tgis import serve
from tgis.config import Config
from tgis.control import Channel, Fatal, Serving, how_ended
from tgis.errors import StartupError

_STOP_SECONDS = 10.0


class Host(msgspec.Struct, frozen=True, tag=16):
    """To the server: what it is to serve."""

    config: Config


def loopback(config: Config) -> Config:
    """The same settings, for a server that only this machine reaches, on any free ports."""
    return msgspec.structs.replace(config, host="127.0.0.1", port=0, grpc_port=0)


class HostedServer:
    """A server in a process of its own.

    Args:
        config: its settings.
        log: where its log goes.
    """

    def __init__(self, config: Config, log: IO[str] | int = subprocess.DEVNULL) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tgis.hosted", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is the owner's alone
            )
        self._channel: Channel[Serving | Fatal] = Channel(ours, Serving | Fatal)
        with contextlib.suppress(OSError):  # its exit is reported by `wait`
            self._channel.send(Host(config))

    def wait(self) -> Serving:
        """Wait until it serves, as long as loading takes.

        Raises:
            StartupError: it cannot.
        """
        while (messages := self._channel.receive()) is not None:
            for message in messages:
                if isinstance(message, Serving):
                    return message
                error = StartupError(message.message)
                error.exit_code = message.exit_code
                raise error
        code = self.process.wait()
        raise StartupError(f"the server ended before it was ready ({how_ended(code)})")

    @property
    def ended(self) -> str:
        """How it ended by itself, or "" while it runs."""
        code = self.process.poll()
        return "" if code is None else how_ended(code)

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """End it; what is left of it after some seconds is killed."""
        self._channel.sock.close()  # tells it; a signal besides would end it at once
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its children end with it
            self.process.wait()


def _end_with(owner: Channel[Host]) -> None:
    """Wait for the owner's end, and end as if told to."""
    while owner.receive() is not None:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Entry point of the server's process."""
    channel: Channel[Host] = Channel(socket.socket(fileno=int(sys.argv[1])), Host)
    while not (messages := channel.receive()):
        if messages is None:  # the owner has gone already
            return 1
    threading.Thread(target=_end_with, args=[channel], daemon=True).start()

    def tell(message: Serving | Fatal) -> None:
        with contextlib.suppress(OSError):  # the owner is gone, which has been noticed
            channel.send(message)

    try:
        return serve.run(messages[0].config, tell)
    except StartupError as error:
        tell(Fatal(" ".join(str(error).split()), error.exit_code))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
