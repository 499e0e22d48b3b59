"""Running a plan so that what fails in it takes as little as possible along.

A step that raises is tried again without drafts, then in parts: what decodes and what prefills,
then halves, until the parts that fail are single rows. That isolates a row that breaks the engine,
and lets a step that ran out of memory succeed with less. The number of tries is limited, because an
engine that fails on everything should say so soon.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tgis.engines.base import Engine
from tgis.engines.plan import Row, StepPlan

log = logging.getLogger(__name__)

MOST_RETRIES = 20


@dataclass(slots=True)
class Done:
    """A part of a plan that has been computed."""

    rows: list[Row]
    logits: torch.Tensor


@dataclass(slots=True)
class Broken:
    """A part of a plan that cannot be computed."""

    rows: list[Row]
    error: Exception


@dataclass(slots=True)
class Run:
    """What became of a plan."""

    done: list[Done] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    num_calls: int = 0  # of the engine
    num_errors: int = 0  # of those, calls that failed
    num_out_of_memory: int = 0  # ... for want of memory
    seconds: float = 0.0  # in the engine


def run(engine: Engine, plan: StepPlan, clock: Callable[[], float] = time.monotonic) -> Run:
    """Compute every row of a plan that can be computed."""
    result = Run()
    parts = [plan]
    while parts:
        part = parts.pop()
        start = clock()
        result.num_calls += 1
        try:
            logits = engine.forward(part)
        except Exception as error:
            _note(result, part, error)
            if any(row.num_drafts for row in part.rows):
                for row in part.rows:
                    row.drop_drafts()
                parts.append(part)
            elif len(part.rows) > 1 and result.num_calls <= MOST_RETRIES:
                parts += _split(part)
            else:
                result.broken.append(Broken(part.rows, error))
        else:
            # What an engine returns is valid until its next step.
            result.done.append(Done(part.rows, logits.clone() if parts else logits))
        result.seconds += clock() - start
    return result


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is want of memory; PyTorch has no class of its own for a CPU's."""
    no_memory = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, no_memory) or "can't allocate memory" in str(error)


def _note(result: Run, part: StepPlan, error: Exception) -> None:
    if is_out_of_memory(error):
        result.num_out_of_memory += 1
    else:
        result.num_errors += 1
    log.error(
        "a step of %d rows, %d tokens failed with %s",
        len(part.rows),
        part.num_tokens,
        type(error).__name__,
        exc_info=error if result.num_calls == 1 else None,
    )


def _split(plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    """Two parts, the one to be run first last."""
    decoding = [row for row in plan.rows if row.num_tokens == 1]
    prefilling = [row for row in plan.rows if row.num_tokens > 1]
    if not decoding or not prefilling:
        half = (len(plan.rows) + 1) // 2
        decoding, prefilling = plan.rows[:half], plan.rows[half:]
    return _part(plan, prefilling), _part(plan, decoding)


def _part(plan: StepPlan, rows: list[Row]) -> StepPlan:
    slots = {row.slot for row in rows}
    return StepPlan(rows, [copy for copy in plan.copies if copy.target in slots])
