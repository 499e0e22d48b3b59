"""The core's process: load the model, then turn the loop for ever."""

import faulthandler
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tgis.config import Config
from tgis.control import Alive, Boot, Channel, Fatal, Loaded, ToChild, open_child
from tgis.core.hang import HangWatch
from tgis.core.link import FrontLink
from tgis.engines.rank_process import start_ranks
from tgis.engines.threads import prepare_openmp
from tgis.errors import StartupError
from tgis.observe import logs
from tgis.wire import Beat, Gauges, Loading, Ready

if TYPE_CHECKING:
    from tgis.core.loop import Core

log = logging.getLogger("tgis.core")

_BEAT_SECONDS = 0.25
_IDLE_SECONDS = 1.0
# A leader rightly waits for its ranks; if they do not come, the watch over them says who it is.
_RANKS_FIRST_SECONDS = 2.0


class Heartbeat(threading.Thread):
    """Tells supervisor and fronts that this process lives, and dies with the supervisor.

    A thread, because the loop is silent while the engine computes. It ends a process whose engine
    hangs: the supervisor then starts the next one.
    """

    def __init__(self, channel: Channel[ToChild], link: FrontLink, config: Config) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._channel = channel
        self._link = link
        patience = config.hang_timeout + (_RANKS_FIRST_SECONDS if config.num_shard > 1 else 0)
        self._hang = HangWatch(patience, config.max_step_seconds, _BEAT_SECONDS)
        self.step_started = 0.0  # CLOCK_MONOTONIC; 0 = idle
        self.gauges = Gauges()

    def run(self) -> None:
        """Beat until the supervisor is gone; then there is nobody left to work for."""
        while True:
            started, now = self.step_started, time.monotonic()
            if fault := self._hang.fault(started, now):
                log.error("%s; giving up. Its threads:\n%s", fault, _stacks())
                os._exit(1)
            busy_for = now - started if started else 0.0
            try:
                self._channel.send(Alive(busy_for))
            except OSError:
                os._exit(1)
            self._link.broadcast(Beat(busy_for, self.gauges))
            readable, _, _ = select.select([self._channel], [], [], _BEAT_SECONDS)
            if readable and self._channel.receive() is None:
                os._exit(1)


def _stacks() -> str:
    """Where every thread is, for the log."""
    with open(os.memfd_create("stacks"), "w+b", buffering=0) as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").rstrip()


def serve(channel: Channel[ToChild], boot: Boot) -> NoReturn:
    """Load the model and serve; ends only by an exception."""
    link = FrontLink(Path(boot.socket_path))
    heartbeat = Heartbeat(channel, link, boot.config)
    heartbeat.start()
    ranks = start_ranks(boot.config, boot.files)
    # Imported late: torch takes a second, and heart and ranks must have begun before that.
    from tgis.core.assembly import assemble

    def progress(bytes_done: int, bytes_total: int) -> None:
        link.greet(Loading(bytes_done, bytes_total))

    core, model = assemble(boot, link, heartbeat, progress, ranks)
    link.greet(Ready(model))
    channel.send(Loaded())
    turn_for_ever(core)


def turn_for_ever(core: "Core", clock: Callable[[], float] = time.monotonic) -> NoReturn:
    """Turn the loop; a second after work has ended, give the system what it needed and has freed.

    The allocator does so only with what lies at the end of its memory.
    """
    from tgis.engines.host_memory import trim

    worked_at, is_tidy = clock(), True
    while True:
        if core.turn(_IDLE_SECONDS):
            worked_at, is_tidy = clock(), False
        elif not is_tidy and clock() - worked_at >= _IDLE_SECONDS:
            trim()
            is_tidy = True


def main() -> int:
    """Entry point."""
    channel, boot = open_child()
    logs.configure(boot.config.log_level, boot.config.log_format, "core")
    faulthandler.enable()  # a crash in native code shall say where
    prepare_openmp(os.environ)
    try:
        serve(channel, boot)
    except StartupError as error:
        channel.send(Fatal(str(error), error.exit_code))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
