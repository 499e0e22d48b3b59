"""What a peer's process does: one workload per line of its input. Runs in the peer's environment.

Standard library only. A line is a JSON list of calls [prompt ids, new tokens]; the answer is a line
`RESULT {"seconds": s, "first": [...], "gaps": [...]}`; times in seconds, `first` from sending
to the first token of each call (empty if the peer cannot tell), `gaps` between tokens.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

Calls = Sequence[tuple[list[int], int]]


class Clock:
    """Times of every call's tokens, from the moment when it is made."""

    def __init__(self, calls: Calls) -> None:
        self._wanted = [new for _, new in calls]
        self._start = self._end = time.perf_counter()
        self._times: list[list[float]] = [[] for _ in calls]

    def tokens(self, call: int, count: int) -> None:
        """`count` tokens of a call have come; several at once share the time since the last."""
        now = self._end = time.perf_counter()
        times = self._times[call]
        last = times[-1] if times else now
        times += [last + (now - last) * (i + 1) / count for i in range(count)]

    def result(self) -> dict[str, object]:
        """The answer.

        Raises:
            RuntimeError: a call has not got as many tokens as it should have.
        """
        got = [len(times) for times in self._times]
        if got != self._wanted:
            raise RuntimeError(f"tokens per call: {got} instead of {self._wanted}")
        return {
            "seconds": self._end - self._start,
            "first": [times[0] - self._start for times in self._times],
            "gaps": [b - a for times in self._times for a, b in zip(times, times[1:])],  # noqa: B905, RUF007
        }


def work(run: Callable[[Calls], dict[str, object]], version: str) -> None:
    """Say that the peer is ready, then run workloads until the input ends."""
    print(f"READY {version}", flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(run(json.loads(line))), flush=True)
