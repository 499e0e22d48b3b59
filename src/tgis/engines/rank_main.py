"""The process of a rank: load a part of the model, then do what the leader says.

It was started by the leader, or by a supervisor of its own to join one. It dies with whoever
started it and with the leader.
"""

import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from tgis import control
from tgis.control import Alive, Boot, Channel, Fatal, ToChild, open_child
from tgis.engines.rank_process import is_spread, num_ranks_here
from tgis.engines.rank_wire import (
    Allocate,
    Allocated,
    Attach,
    Beat,
    Broken,
    Connect,
    Connected,
    Detach,
    Loaded,
    Release,
    Step,
    ToRank,
)
from tgis.engines.threads import prepare_openmp
from tgis.errors import StartupError
from tgis.observe import logs

if TYPE_CHECKING:
    from tgis.engines.base import Engine
    from tgis.models.collectives import Group

log = logging.getLogger("tgis.rank")

_BEAT_MILLISECONDS = 250
# The leader should be the first to miss a rank in a collective, because it knows which one it is.
_LEADER_FIRST_SECONDS = 2.0


class Heart(threading.Thread):
    """Tells the others that this process lives, and dies with them.

    A thread, because the main one is silent while it computes.
    """

    def __init__(self) -> None:
        super().__init__(name="heart", daemon=True)
        self._poll = select.poll()
        self._others: list[tuple[Channel[Any], Callable[[], msgspec.Struct]]] = []
        self._speaking = threading.Lock()
        self.num_entered: Callable[[], int] = lambda: 0  # collectives so far

    def beat_to(self, other: Channel[Any], sign: Callable[[], msgspec.Struct]) -> None:
        """From now on give this one a sign of life, and do not outlive it."""
        self._others.append((other, sign))
        self._poll.register(other, select.POLLRDHUP | select.POLLHUP | select.POLLERR)

    def follow(self, leader: Channel[ToRank]) -> None:
        """Beat to the leader."""
        self.beat_to(leader, lambda: Beat(self.num_entered()))

    def say(self, other: Channel[Any], message: msgspec.Struct) -> None:
        """Send between the beats."""
        with self._speaking:
            other.send(message)

    def run(self) -> None:
        """Beat until one of the others is gone; then there is nobody left to work for."""
        while not self._poll.poll(_BEAT_MILLISECONDS):
            for other, sign in tuple(self._others):
                try:
                    self.say(other, sign())
                except OSError:
                    os._exit(1)
        os._exit(1)


def serve(boot: Boot, supervisor: Channel[ToChild], leader: Channel[ToRank], heart: Heart) -> None:
    """Load this rank's part and obey; returns when the leader is gone.

    Raises:
        StartupError: the part cannot be loaded.
    """
    import torch

    from tgis.engines.host_memory import available_memory
    from tgis.engines.registry import load_engine
    from tgis.engines.threads import choose_threads
    from tgis.models.collectives import Group, GroupError
    from tgis.models.parallel import Shard

    config, files = boot.config, boot.files
    ranks_here = num_ranks_here(config)
    threads, why = choose_threads(config.threads, files, ranks_here)
    log.info("computing with %d threads: %s", threads, why)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    shard = Shard(config.rank, config.num_shard)
    group = Group(shard, config.hang_timeout + _LEADER_FIRST_SECONDS)
    heart.num_entered = lambda: group.num_entered
    engine = load_engine(config, files, group=group)
    heart.say(leader, Loaded(available_memory(), ranks_here))
    if is_spread(config):
        heart.say(supervisor, control.Loaded())
    try:
        _obey(leader, heart, engine, group)
    except GroupError as error:
        # It is for the leader to find out which rank is at fault, and to end them all.
        heart.say(leader, Broken(str(error)))
        while leader.receive() is not None:
            pass


def _obey(leader: Channel[ToRank], heart: Heart, engine: "Engine", group: "Group") -> None:
    from tgis.engines.rendezvous import meet
    from tgis.models.collectives import GroupError

    while (messages := leader.receive()) is not None:
        for message in messages:
            match message:
                case Step():
                    try:
                        engine.forward(message.plan)
                    except GroupError:
                        raise
                    except Exception:  # the leader has been told with the logits
                        log.exception("this rank's part of a step failed")
                case Release():
                    engine.release(message.slots)
                case Attach():
                    _attach(engine, message)
                case Detach():
                    engine.detach(message.handle)
                case Allocate():
                    engine.allocate(message.shape)
                    heart.say(leader, Allocated())
                case Connect():
                    group.connect(*meet(message))
                    heart.say(leader, Connected())


def _attach(engine: "Engine", message: Attach) -> None:
    from tgis.adapters.packed import Packed, unpack

    try:
        engine.attach(message.handle, unpack(Packed(message.kind, message.data)))
    except Exception:  # the steps that name it will say so
        log.exception("this rank has not got adapter %d", message.handle)


def main() -> int:
    """Entry point."""
    parent, boot = open_child()
    config = boot.config
    logs.configure(config.log_level, config.log_format, f"rank{config.rank}")
    prepare_openmp(os.environ)
    heart = Heart()
    leader: Channel[ToRank] | None = None
    if is_spread(config):
        heart.beat_to(parent, Alive)
    else:
        leader = Channel(parent.sock, ToRank)
        heart.follow(leader)
    heart.start()
    try:
        if leader is None:
            leader = _join(boot)
            heart.follow(leader)
        serve(boot, parent, leader, heart)
    except StartupError as error:
        listeners = {id(c): c for c in (parent, leader) if c is not None}
        for channel in listeners.values():
            heart.say(channel, Fatal(str(error), error.exit_code))
        return error.exit_code
    except OSError as error:
        log.debug("the leader is gone: %s", error)
    return 1


def _join(boot: Boot) -> Channel[ToRank]:
    from tgis.engines import rendezvous

    return rendezvous.join(boot.config, rendezvous.hello(boot.config, boot.files))


if __name__ == "__main__":
    sys.exit(main())
