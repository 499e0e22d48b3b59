"""What fails in a step fails alone."""

from collections.abc import Callable

import pytest
import torch
from tests.kit.fake_engine import FakeEngine

from tgis.core import runner
from tgis.engines.base import CacheShape
from tgis.engines.plan import KvCopy, Row, StepPlan, Want


def plan_of(*lengths: int, copies: list[KvCopy] | None = None) -> StepPlan:
    rows = [
        Row(number, number, list(range(length)), 0, Want.LAST)
        for number, length in enumerate(lengths)
    ]
    return StepPlan(rows, copies or [])


def engine_with(before_forward: Callable[[StepPlan], None], num_slots: int = 64) -> FakeEngine:
    engine = FakeEngine(before_forward)
    engine.allocate(CacheShape(num_slots, 64))
    return engine


def poisoned(*seq_ids: int, error: type[Exception] = RuntimeError) -> Callable[[StepPlan], None]:
    def before(plan: StepPlan) -> None:
        if any(row.seq_id in seq_ids for row in plan.rows):
            raise error("poisoned")

    return before


def ids(parts: list[runner.Done] | list[runner.Broken]) -> set[int]:
    return {row.seq_id for part in parts for row in part.rows}


def test_a_step_that_succeeds_is_run_once() -> None:
    engine = engine_with(lambda plan: None)
    result = runner.run(engine, plan_of(1, 5, 1))
    assert (len(result.done), result.broken, result.num_calls) == (1, [], 1)
    assert result.done[0].logits.shape[0] == 3


@pytest.mark.parametrize("bad", range(10))
def test_one_bad_row_fails_alone(bad: int) -> None:
    engine = engine_with(poisoned(bad))
    result = runner.run(engine, plan_of(1, 1, 1, 1, 9, 8, 7, 1, 1, 5))
    assert ids(result.broken) == {bad}
    assert ids(result.done) == set(range(10)) - {bad}
    assert result.num_calls <= 2 + 2 * 4


def test_a_new_batch_that_fails_does_not_touch_those_that_decode() -> None:
    engine = engine_with(poisoned(2, 3, 4))
    result = runner.run(engine, plan_of(1, 1, 9, 8, 7))
    assert ids(result.broken) == {2, 3, 4}
    assert ids(result.done) == {0, 1}


def test_a_step_that_is_too_large_succeeds_in_parts() -> None:
    def limited(plan: StepPlan) -> None:
        if plan.num_tokens > 10:
            raise MemoryError

    result = runner.run(engine_with(limited), plan_of(*[5] * 8))
    assert not result.broken
    assert ids(result.done) == set(range(8))
    assert result.num_out_of_memory == 3
    assert result.num_errors == 0


def test_torch_running_out_of_memory_is_known_as_such() -> None:
    def greedy(plan: StepPlan) -> None:
        if plan.num_tokens > 10:
            torch.empty(1 << 60, dtype=torch.uint8)

    result = runner.run(engine_with(greedy), plan_of(4, 4, 4))
    assert (result.num_out_of_memory, result.num_errors) == (1, 0)
    assert not result.broken


def test_an_engine_that_always_fails_says_so_soon() -> None:
    def always(plan: StepPlan) -> None:
        raise RuntimeError

    result = runner.run(engine_with(always, 256), plan_of(*[1] * 256))
    assert ids(result.broken) == set(range(256))
    assert sum(len(part.rows) for part in result.broken) == 256
    assert result.num_calls == result.num_errors <= 2 * runner.MOST_RETRIES


def test_copies_go_with_the_rows_that_need_them() -> None:
    engine = engine_with(poisoned(0))
    engine.cache.compute(StepPlan([Row(9, 9, [1, 2, 3, 4], 0, Want.LAST)]))
    plan = plan_of(1, 1, copies=[KvCopy(9, 0, 3), KvCopy(9, 1, 3)])
    plan.rows[1].start = 3
    result = runner.run(engine, plan)
    assert ids(result.done) == {1}
    (done,) = engine.plans
    assert done.copies == [KvCopy(9, 1, 3)]
