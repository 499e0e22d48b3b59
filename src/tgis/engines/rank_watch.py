"""The leader's view of its ranks: what they say, whether they live, and the end of them all.

A group that has lost one rank is of no use. The leader then ends itself, which ends the others, and
the supervisor starts a new one.
"""

import logging
import os
import queue
import selectors
import subprocess
import threading
import time
from typing import NoReturn, TypeVar

from tgis.control import LAST_WORDS_SECONDS, Fatal, ask_for_stacks, how_ended
from tgis.engines.rank_process import Rank
from tgis.engines.rank_wire import Beat, Broken, ToLeader
from tgis.errors import ModelError, StartupError
from tgis.models.collectives import Group

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_LOADING_SECONDS = 60.0  # of silence while a rank starts and loads, which keeps even threads busy
# Between a broken collective and the end: two beats of the others, which tell who is at fault.
_SUSPENSE_SECONDS = 0.5

T = TypeVar("T")


def collective_timeout(hang_timeout: float) -> float:
    """Seconds that the leader waits in a collective: with all that follows, `hang_timeout`."""
    return _before(hang_timeout, _SUSPENSE_SECONDS + _TICK_SECONDS + LAST_WORDS_SECONDS)


def _before(hang_timeout: float, seconds: float) -> float:
    """So long before the time is over, but not before half of it."""
    return hang_timeout - min(seconds, hang_timeout / 2)


class Watch(threading.Thread):
    """Listens to all ranks.

    Args:
        group: the leader's own collectives.
        hang_timeout: seconds after which a group with a silent rank has ended.
    """

    def __init__(self, ranks: list[Rank], group: Group, hang_timeout: float) -> None:
        super().__init__(name="ranks", daemon=True)
        self._ranks = ranks
        self._group = group
        self._most_silence = _before(hang_timeout, _TICK_SECONDS + LAST_WORDS_SECONDS)
        self._answers: queue.SimpleQueue[tuple[Rank, ToLeader]] = queue.SimpleQueue()
        self._fatal: StartupError | None = None
        self._suspicion: tuple[float, str] | None = None
        self._selector = selectors.DefaultSelector()
        self.closing = False

    def expect(self, kind: type[T]) -> list[T]:
        """Wait until every rank has said this, in no particular order.

        Raises:
            StartupError: a rank said that it cannot go on.
        """
        answers: list[T] = []
        for _ in self._ranks:
            rank, answer = self._answers.get()
            self.check()
            assert isinstance(answer, kind), f"rank {rank.number} answers out of turn"
            answers.append(answer)
        return answers

    def check(self) -> None:
        """Raise what a rank has reported, if any has.

        Raises:
            StartupError: a rank said that it cannot go on.
        """
        if self._fatal is not None:
            raise self._fatal

    def suspect(self, text: str) -> None:
        """A collective broke; end in a moment, when it is known which rank is at fault."""
        if self._suspicion is None:
            self._suspicion = (time.monotonic() + _SUSPENSE_SECONDS, text)

    def lost(self, error: Exception) -> NoReturn:
        """A rank cannot be reached; does not return, since the process ends."""
        self.suspect(str(error))
        while True:
            threading.Event().wait()

    def run(self) -> None:
        """Listen until the process ends."""
        for rank in self._ranks:
            rank.last_heard = time.monotonic()
            self._selector.register(rank.channel, selectors.EVENT_READ, rank)
        while not self.closing:
            for key, _ in self._selector.select(_TICK_SECONDS):
                self._listen(key.data)
            self._judge(time.monotonic())

    def _listen(self, rank: Rank) -> None:
        try:
            messages = rank.channel.receive()
        except OSError as error:
            self._end(f"rank {rank.number} cannot be reached: {error}")
            return
        if messages is None:
            self._selector.unregister(rank.channel)
            if self._fatal is None:
                self._end(f"rank {rank.number} died{_how(rank)}")
            return
        rank.last_heard = time.monotonic()
        for message in messages:
            match message:
                case Beat():
                    rank.num_entered = message.num_entered
                case Broken():
                    self.suspect(f"rank {rank.number}: {message.message}")
                case Fatal():
                    self._fatal = ModelError(f"rank {rank.number}: {message.message}")
                    self._fatal.exit_code = message.exit_code
                    self._answers.put((rank, message))
                case _:
                    rank.loaded = True
                    self._answers.put((rank, message))

    def _judge(self, now: float) -> None:
        for rank in self._ranks:
            silence = now - rank.last_heard
            limit = self._most_silence if rank.loaded else _LOADING_SECONDS
            if silence > limit and self._fatal is None:
                self._end(f"rank {rank.number} has been silent for {silence:.1f} s", rank)
        if self._suspicion is not None and now > self._suspicion[0]:
            self._end(f"{self._laggard()}: {self._suspicion[1]}", *self._ranks)

    def _laggard(self) -> str:
        """Who has come to fewer collectives than others."""
        entered = {0: self._group.num_entered} | {r.number: r.num_entered for r in self._ranks}
        least, most = min(entered.values()), max(entered.values())
        late = [number for number, n in entered.items() if n == least]
        if least == most:
            return "the ranks have lost each other"
        which = f"rank {late[0]} is" if len(late) == 1 else f"ranks {late} are"
        return f"{which} stuck before collective {least + 1}, others are at {most}"

    def _end(self, text: str, *stuck: Rank) -> None:
        """End the group; those who may be stuck say first where they are."""
        if self.closing:
            return
        self.closing = True
        log.error("%s; ending the %d ranks of this model", text, len(self._ranks) + 1)
        here = [rank.process.pid for rank in stuck if rank.process is not None]
        for pid in here:
            ask_for_stacks(pid)
        if here:
            time.sleep(LAST_WORDS_SECONDS)
        os._exit(1)


def _how(rank: Rank) -> str:
    if rank.process is None:
        return ""
    try:
        return f" ({how_ended(rank.process.wait(1))})"
    except subprocess.TimeoutExpired:
        return ""
