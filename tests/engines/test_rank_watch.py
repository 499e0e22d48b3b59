"""How the leader notices that a rank is lost, and what it then says."""

import logging
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tgis.control import Channel, Fatal
from tgis.engines import rank_watch
from tgis.engines.rank_process import Rank
from tgis.engines.rank_watch import Watch
from tgis.engines.rank_wire import Beat, Broken, Connected, Loaded, ToLeader, ToRank
from tgis.errors import StartupError
from tgis.models.collectives import Group

WAIT = 20.0


@dataclass
class House:
    """A watch over two ranks, whose ends the test holds."""

    watch: Watch
    ends: list[Channel[ToRank]]
    group: Group
    exits: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)

    def exit_code(self) -> int:
        return self.exits.get(timeout=WAIT)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[House]:
    hang_timeout = getattr(request, "param", WAIT)
    pairs = [socket.socketpair() for _ in range(2)]
    ranks = [Rank(n, Channel(ours, ToLeader)) for n, (ours, _) in enumerate(pairs, start=1)]
    group = Group()
    watch = Watch(ranks, group, hang_timeout)
    house = House(watch, [Channel(theirs, ToRank) for _, theirs in pairs], group)

    monkeypatch.setattr(rank_watch.os, "_exit", house.exits.put)
    monkeypatch.setattr(rank_watch, "_SUSPENSE_SECONDS", 0.1)
    watch.start()
    yield house
    watch.closing = True
    watch.join(WAIT)
    for pair in pairs:
        for sock in pair:
            sock.close()


def said(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    return record.getMessage()


def test_answers_are_awaited(house: House) -> None:
    for number, end in enumerate(house.ends):
        end.send(Beat(0))
        end.send(Loaded(100 + number, 2))
    loaded = house.watch.expect(Loaded)
    assert sorted(answer.available_memory for answer in loaded) == [100, 101]
    for end in house.ends:
        end.send(Connected())
    assert len(house.watch.expect(Connected)) == 2


def test_what_a_rank_reports_is_raised_with_its_number(house: House) -> None:
    house.ends[1].send(Fatal("no such weight", 2))
    house.ends[1].sock.close()
    with pytest.raises(StartupError, match="rank 2: no such weight") as caught:
        house.watch.expect(Loaded)
    assert caught.value.exit_code == 2
    with pytest.raises(StartupError):
        house.watch.check()
    assert house.exits.empty()


def test_a_rank_that_dies(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.ends[0].sock.close()
    assert house.exit_code() == 1
    assert said(caplog) == "rank 1 died; ending the 3 ranks of this model"


def test_how_a_process_died_is_said(house: House, caplog: pytest.LogCaptureFixture) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(7)"])
    house.watch._ranks[1].process = process
    process.wait()
    house.ends[1].sock.close()
    assert house.exit_code() == 1
    assert "rank 2 died (exit code 7)" in said(caplog)


@pytest.mark.parametrize("house", [1.5], indirect=True)
def test_a_rank_that_falls_silent(house: House, caplog: pytest.LogCaptureFixture) -> None:
    silent, beating = house.ends
    silent.send(Loaded(1, 1))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            beating.send(Beat(0))

    thread = threading.Thread(target=beat)
    thread.start()
    assert house.exit_code() == 1
    stop.set()
    thread.join()
    assert "rank 1 has been silent for 1." in said(caplog)


@pytest.mark.parametrize("house", [0.3], indirect=True)
def test_while_it_loads_a_rank_may_be_silent_for_longer(house: House) -> None:
    with pytest.raises(queue.Empty):
        house.exits.get(timeout=1.0)


def test_the_one_that_is_stuck_is_named(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.group.num_entered = 7
    house.ends[1].send(Beat(5))
    house.ends[0].send(Beat(7))
    house.ends[0].send(Broken("Timed out"))
    assert house.exit_code() == 1
    text = "rank 2 is stuck before collective 6, others are at 7: rank 1: Timed out; ending"
    assert said(caplog).startswith(text)


def test_a_broken_collective_of_the_leader(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.group.num_entered = 3
    for end in house.ends:
        end.send(Beat(2))
    house.watch.suspect("gone")  # what `lost` does before it waits for the end
    assert house.exit_code() == 1
    assert "gone" in said(caplog)


def test_a_death_explains_a_broken_collective(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.ends[0].send(Broken("Connection closed by peer"))
    house.ends[1].sock.close()
    assert house.exit_code() == 1
    assert said(caplog).startswith("rank 2 died")


def test_what_a_stuck_rank_costs_is_within_the_limit() -> None:
    for limit in (1.0, 2.0, 5.0, 60.0):
        timeout = rank_watch.collective_timeout(limit)
        assert limit / 2 <= timeout <= limit - min(0.75, limit / 2)
