"""The process's own loop."""

import pytest

from tgis.core.__main__ import turn_for_ever
from tgis.engines import host_memory


class Stop(Exception):
    pass


class Turns:
    """A core whose turns take so long and have work or not, and a clock."""

    def __init__(self, turns) -> None:
        self._turns = iter(turns)
        self.now = 100.0
        self.count = 0

    def turn(self, wait: float) -> bool:
        found = next(self._turns, None)
        if found is None:
            raise Stop
        had_work, took = found
        self.now += took
        self.count += 1
        return had_work


IDLE, WORK = (False, 1.0), (True, 0.01)


@pytest.mark.parametrize(
    ("turns", "trimmed"),
    [
        ([IDLE] * 3, []),  # nothing has been done since the start
        ([WORK, WORK, IDLE, IDLE, IDLE], [3]),
        ([WORK, (False, 0.1), WORK, (False, 0.4), (False, 0.5), (False, 0.2)], [6]),
        ([(True, 60.0), WORK, (False, 0.5)], []),  # a long step is no idleness
        ([WORK, IDLE, WORK, IDLE, IDLE], [2, 4]),
    ],
)
def test_memory_is_given_back_once_a_second_after_work(turns, trimmed, monkeypatch) -> None:
    core, found = Turns(turns), []
    monkeypatch.setattr(host_memory, "trim", lambda: found.append(core.count))
    with pytest.raises(Stop):
        turn_for_ever(core, lambda: core.now)
    assert found == trimmed
