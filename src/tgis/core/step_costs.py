"""What a step costs by the number of its tokens: measured at start, since it decides about drafts.

A step of one token reads all weights, and one of a few tokens hardly does more; how many that are,
and what more of them cost, depends on machine, type and quantisation.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from tgis.engines.base import Engine
from tgis.engines.plan import Row, StepPlan, Want

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32)
_TIMES = 7  # that each is tried, at different moments; the best is what an idle machine would show
_MOST_SECONDS = 3.0  # after which no more is tried


class StepCosts:
    """Seconds of a step.

    Args:
        sizes: numbers of tokens, ascending.
        seconds: of a step of each size.
    """

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        self._sizes = list(sizes)
        # More tokens never take less: what is slower than a larger step was disturbed.
        self._seconds = list(accumulate(reversed(seconds), min))[::-1]

    def of(self, num_tokens: int) -> float:
        """Between the measured sizes, and beyond them, along straight lines."""
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1 or num_tokens <= sizes[0]:
            return seconds[0]
        right = min(bisect_left(sizes, num_tokens), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return seconds[left] + slope * (num_tokens - sizes[left])


def measure(
    engine: Engine, length: int, what: str, clock: Callable[[], float] = time.perf_counter
) -> StepCosts:
    """Time steps of one sequence, all logits wanted, as they verify drafts.

    The engine's cache must be allocated; slot 0 is used and given back.

    Args:
        length: tokens that a slot holds.
        what: it is, for the log.
    """
    begun = clock()
    best: dict[int, float] = {}
    for size in [size for size in SIZES if size <= length] * _TIMES:
        if best and clock() - begun > _MOST_SECONDS:
            break
        best[size] = min(best.get(size, math.inf), _time(engine, size, clock))
    engine.release([0])
    sizes = list(best)
    costs = StepCosts(sizes, list(best.values()))
    log.info(
        "a step of %s tokens of %s takes %s ms",
        ", ".join(map(str, sizes)),
        what,
        ", ".join(f"{costs.of(size) * 1e3:.1f}" for size in sizes),
    )
    return costs


def _time(engine: Engine, size: int, clock: Callable[[], float]) -> float:
    tokens = [number % engine.caps.vocab_size for number in range(size)]
    table = list(range(-(-size // engine.caps.kv_granule)))  # read in the layout of blocks only
    start = clock()
    engine.forward(StepPlan([Row(0, 0, tokens, 0, Want.ALL, table)]))
    return clock() - start
