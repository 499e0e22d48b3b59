"""What is a hang, and what only looks like one."""

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.kit.processes import wait_until

from tgis.core import hang
from tgis.core.hang import Activity, HangWatch

BEAT = 0.25


@dataclass
class Clock:
    """A process whose activity is made up; each beat is a quarter of a second."""

    watch: HangWatch = field(init=False)
    limit: float = 5.0
    max_step: float | None = None
    now: float = 100.0
    cpu: float = 0.0
    reads: int = 0
    at_work: bool = False

    def __post_init__(self) -> None:
        self.watch = HangWatch(
            self.limit,
            self.max_step,
            BEAT,
            lambda: Activity(self.cpu, self.reads),
            lambda: self.at_work,
        )

    def beats(
        self, seconds: float, started: float, each: Callable[["Clock"], None] = lambda _: None
    ) -> float | None:
        """When a fault was found, in seconds since `started`; None = never."""
        for _ in range(int(seconds / BEAT)):
            self.now += BEAT
            each(self)
            if self.watch.fault(started, self.now):
                return self.now - started
        return None


def test_a_step_in_which_nothing_happens_is_a_hang_within_the_limit() -> None:
    clock = Clock()
    assert clock.beats(60, 0.0) is None  # idle
    found = clock.beats(60, clock.now)
    assert found is not None
    assert 4.5 <= found <= 5.0


@pytest.mark.parametrize(
    "work",
    [
        lambda clock: setattr(clock, "cpu", clock.cpu + 0.2),
        lambda clock: setattr(clock, "reads", clock.reads + 1),
        lambda clock: setattr(clock, "at_work", True),
    ],
    ids=["computes", "faults pages in", "waits for a core or a disk"],
)
def test_a_long_step_is_no_hang(work: Callable[[Clock], None]) -> None:
    clock = Clock()
    assert clock.beats(60, clock.now, work) is None


def test_a_hang_after_a_long_computation_is_found() -> None:
    clock = Clock()
    started = clock.now
    assert clock.beats(60, started, lambda c: setattr(c, "cpu", c.cpu + 0.2)) is None
    found = clock.beats(60, started)
    assert found is not None
    assert 64.5 <= found <= 65.0


def test_steps_that_wait_a_little_are_no_hang() -> None:
    clock = Clock()
    for _ in range(20):
        assert clock.beats(4, clock.now) is None


def test_a_process_that_was_frozen_is_not_blamed() -> None:
    clock = Clock()
    started = clock.now
    assert clock.beats(2, started) is None
    clock.now += 600
    assert clock.beats(2, started) is None


def test_a_limit_for_steps_that_compute_for_ever() -> None:
    clock = Clock(max_step=30)
    assert clock.beats(60, 0.0) is None
    found = clock.beats(60, clock.now, lambda c: setattr(c, "cpu", c.cpu + 0.2))
    assert found == 30 + BEAT


def test_the_activity_of_this_process_is_seen(tmp_path: Path) -> None:
    before = hang.activity()
    assert hang.activity().is_idle_since(before)
    worker = threading.Thread(target=lambda: sum(range(3_000_000)))
    worker.start()
    worker.join()
    assert not hang.activity().is_idle_since(before)


def test_a_sleeping_process_is_not_at_work() -> None:
    """The thread that looks is a daemon, as the heartbeat is; this one waits for it."""
    seen: list[bool] = []

    def look() -> None:
        wait_until(lambda: not hang.is_at_work())
        seen.append(True)

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    looker.join()
    assert seen


def test_a_computing_thread_is_at_work() -> None:
    done = threading.Event()
    data = mmap.mmap(-1, 1 << 20)

    def compute() -> None:
        while not done.is_set():
            data.find(b"x")

    worker = threading.Thread(target=compute)
    worker.start()
    try:
        assert hang.is_at_work()  # this one is
    finally:
        done.set()
        worker.join()
