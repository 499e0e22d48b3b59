"""Noticing that the engine hangs: a step is under way, and the process does nothing at all.

The heartbeat goes on while the main thread waits inside a C call for what never comes. Slowness is
no hang: a thread that computes, waits for its turn on a core, or waits for a disk is at work.
"""

import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# What the daemon threads' own bookkeeping may take between two looks; a step takes all there is.
_LEAST_CPU_SECONDS = 0.01


class Activity(NamedTuple):
    """What this process has done since it began."""

    cpu_seconds: float  # of all threads but the one that looks
    disk_reads: int  # page faults and reads that memory could not answer

    def is_idle_since(self, before: "Activity") -> bool:
        """Whether next to nothing has been done since an earlier look."""
        used = self.cpu_seconds - before.cpu_seconds
        return used < _LEAST_CPU_SECONDS and self.disk_reads == before.disk_reads


def activity() -> Activity:
    """Look at this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = usage.ru_utime + usage.ru_stime - time.thread_time()
    return Activity(cpu_seconds, usage.ru_majflt + usage.ru_inblock)


def is_at_work() -> bool:
    """Whether some thread runs, would run if it had a core (R), or waits for a disk (D).

    Daemon threads do not count: they look after others, and sleep in between.
    """
    helpers = {thread.native_id for thread in threading.enumerate() if thread.daemon}
    for name in os.listdir("/proc/self/task"):
        if int(name) not in helpers and _state(Path("/proc/self/task", name, "stat")) in "RD":
            return True
    return False


def _state(stat: Path) -> str:
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
        return "X"


class HangWatch:
    """Judges, at every beat, whether the step under way hangs.

    Counts beats instead of seconds, so that a process that was frozen as a whole is not blamed.

    Args:
        hang_timeout: seconds without activity that make a hang.
        max_step_seconds: age at which a step counts as a hang whatever it does; None = none.
        beat_seconds: time between two calls of `fault`.
    """

    def __init__(
        self,
        hang_timeout: float,
        max_step_seconds: float | None,
        beat_seconds: float,
        activity: Callable[[], Activity] = activity,
        is_at_work: Callable[[], bool] = is_at_work,
    ) -> None:
        # One less, because a step begins between two beats.
        self._most_idle = max(2, int(hang_timeout / beat_seconds) - 1)
        self._max_step_seconds = max_step_seconds
        self._activity = activity
        self._is_at_work = is_at_work
        self._last = (0.0, Activity(0.0, 0))
        self._num_idle = 0

    def fault(self, step_started: float, now: float) -> str | None:
        """What is wrong with the step, if anything is.

        Args:
            step_started: when the step under way began, as `now` on CLOCK_MONOTONIC; 0 = none.
        """
        (last_step, before), after = self._last, self._activity()
        self._last = (step_started, after)
        same_step = step_started > 0 and step_started == last_step
        idle = same_step and after.is_idle_since(before) and not self._is_at_work()
        self._num_idle = self._num_idle + 1 if idle else 0
        age = now - step_started
        if self._num_idle >= self._most_idle:
            return f"a step hangs: it began {age:.1f} s ago, and nothing is being computed or read"
        if step_started and self._max_step_seconds is not None and age > self._max_step_seconds:
            return f"a step began {age:.1f} s ago, longer than --max-step-seconds allows"
        return None
