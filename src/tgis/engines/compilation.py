"""PT2_COMPILE: an engine gets its network compiled, and proves it on steps like those to come.

The steps are those at the bounds of what the server's limits allow, and ten random ones. Whatever
stands in the way, the model is served uncompiled.
"""

import logging
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from tgis import clib
from tgis.clib import BuildError
from tgis.engines.base import Engine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.probe import TOLERANCE
from tgis.types import Compilation

log = logging.getLogger(__name__)

_SEED = 42  # TGIS's
_NUM_RANDOM = 10
_MOST_LOGITS = 64  # of one sequence in a warm-up step; all of a long one take much memory
_WANTS = tuple(Want)


@runtime_checkable
class Compilable(Protocol):
    """An engine that can have its network compiled."""

    def compile(self, directory: Path) -> bool:
        """Let compiled code compute the steps from now on; see `NativeEngine.compile`."""

    def deviation(self, plan: StepPlan) -> float:
        """How far a compiled step's logits are from the others, as a share of the largest."""

    def uncompile(self) -> None:
        """Let the network compute the steps as it was loaded."""


class Bounds(NamedTuple):
    """What a step may be."""

    max_running: int  # sequences
    max_step_tokens: int
    max_sequence_length: int
    kv_tokens: int  # that fit into memory


class Compilations:
    """What PyTorch compiles in this process from now on, by its own count."""

    def __init__(self) -> None:
        self._seen = _num_graphs()

    def drain(self) -> int:
        """Graphs that were compiled since this was asked last."""
        before, self._seen = self._seen, _num_graphs()
        return self._seen - before


def _num_graphs() -> int:
    compiler = sys.modules.get("torch._dynamo.utils")  # without it there are none
    return int(compiler.counters["stats"]["unique_graphs"]) if compiler else 0


def compile_network(
    engine: Engine, cache: str | None, bounds: Bounds, num_shard: int = 1
) -> Compilation:
    """Have the engine's network compiled, if that can be done.

    Args:
        engine: its cache allocated, and nothing in it.
        cache: directory where compiled code is kept between starts; None = the user's.
        num_shard: processes among which the model is split.
    """
    start = time.monotonic()
    log.info("Warming up PyTorch 2 compile...")
    try:
        if num_shard > 1:
            raise BuildError(f"a model split among {num_shard} processes is not compiled")
        directory = Path(cache) if cache else clib.user_cache("compiled")
        is_new, num_steps = _compile(engine, directory, bounds)
    except BuildError as error:
        log.warning("PT2_COMPILE: %s; the model is served uncompiled", error)
        return Compilation(seconds=time.monotonic() - start)
    seconds = time.monotonic() - start
    log.info("Time spent during compile warmup: %s minutes", round(seconds / 60, 2))
    origin = "now" if is_new else "at an earlier start"
    log.info("compiled %s; %d steps gave what they give uncompiled", origin, num_steps)
    return Compilation(active=True, num_compiled=int(is_new), seconds=seconds)


def _compile(engine: Engine, directory: Path, bounds: Bounds) -> tuple[bool, int]:
    if not isinstance(engine, Compilable):
        kind = engine.caps.kind.name.lower().replace("_", "-")
        raise BuildError(f"engine {engine.caps.name} does not compile {kind} models")
    if engine.caps.kv_layout != "rows":
        raise BuildError(f"nothing is compiled for the {engine.caps.kv_layout} layout of the cache")
    is_new = engine.compile(directory)
    steps = list(warm_up(bounds, engine.caps.kv_granule, engine.caps.vocab_size))
    for plan in steps:
        deviation = engine.deviation(plan)
        engine.release([row.slot for row in plan.rows])
        if not deviation <= TOLERANCE[engine.caps.dtype]:
            engine.uncompile()
            raise BuildError(f"compiled code is wrong: logits deviate by {deviation:.2%}")
    return is_new, len(steps)


def warm_up(bounds: Bounds, granule: int, vocab_size: int) -> Iterator[StepPlan]:
    """The steps, over the first slots.

    A row may begin anywhere: what was not computed before it reads as zeros, and takes no memory.

    Args:
        granule: tokens of a row that are committed at a time.
    """
    rng = random.Random(_SEED)
    longest = min(bounds.max_step_tokens, bounds.max_sequence_length)
    beside_tokens = bounds.kv_tokens - bounds.max_step_tokens
    most_rows = min(bounds.max_running, bounds.max_step_tokens, beside_tokens // (2 * granule))
    most_rows = max(most_rows, 1)

    def row(slot: int, length: int, want: Want) -> Row:
        start = rng.randint(0, bounds.max_sequence_length - length)
        if want is Want.ALL and length > _MOST_LOGITS:
            want = Want.LAST
        return Row(slot, slot, rng.choices(range(vocab_size), k=length), start, want)

    def step(*shares: tuple[int, Want]) -> StepPlan:
        return StepPlan([row(slot, *share) for slot, share in enumerate(shares)])

    decoding = (1, Want.LAST)
    for count in sorted({1, min(2, most_rows), most_rows}):
        yield step(*[decoding] * count)
    yield step((longest, Want.LAST))
    yield step((longest, Want.NOTHING))
    yield step((min(longest, _MOST_LOGITS), Want.ALL))
    chunk = min(longest, bounds.max_step_tokens - most_rows + 1)
    yield step(*[decoding] * (most_rows - 1), (chunk, Want.NOTHING))
    for _ in range(_NUM_RANDOM):
        count = rng.randint(1, most_rows)
        lengths = _lengths(rng, count, bounds.max_step_tokens, longest)
        yield step(*((length, rng.choice(_WANTS)) for length in lengths))


def _lengths(rng: random.Random, count: int, total: int, longest: int) -> list[int]:
    """New tokens of some rows: about half of these decode."""
    spare, lengths = total - count, []
    for _ in range(count):
        more = rng.choice((0, rng.randint(0, min(spare, longest - 1))))
        spare -= more
        lengths.append(1 + more)
    return lengths
