"""Costs of steps, measured and in between."""

import itertools

import pytest
from tests.kit.fake_engine import FakeEngine

from tgis.core.step_costs import SIZES, StepCosts, measure
from tgis.engines.base import CacheShape
from tgis.engines.plan import StepPlan


def test_along_straight_lines() -> None:
    costs = StepCosts([1, 4, 8], [1.0, 1.0, 2.0])
    assert [costs.of(size) for size in (0, 1, 3, 4, 6, 8, 12)] == [1, 1, 1, 1, 1.5, 2, 3]


def test_more_tokens_never_take_less() -> None:
    costs = StepCosts([1, 2, 4, 8], [1.0, 9.0, 2.0, 3.0])
    assert [costs.of(size) for size in (1, 2, 4)] == [1.0, 2.0, 2.0]


def test_one_size_says_nothing_of_others() -> None:
    assert StepCosts([1], [2.0]).of(9) == 2.0


@pytest.mark.parametrize(("length", "sizes"), [(100, SIZES), (8, SIZES[:4]), (1, (1,))])
def test_measured_on_the_engine(length: int, sizes: tuple[int, ...]) -> None:
    engine = FakeEngine()
    engine.allocate(CacheShape(2, length))
    costs = measure(engine, length, "it", itertools.count(0.0, 0.001).__next__)
    assert [plan.num_tokens for plan in engine.plans] == [*sizes] * 7
    assert costs.of(1) == pytest.approx(0.001)
    assert costs.of(sizes[-1]) == pytest.approx(0.001)
    assert not engine.cache.slots[0], "the slot was given back"


def test_measured_in_blocks() -> None:
    engine = FakeEngine(kv_layout="blocks", block_tokens=4)
    engine.allocate(CacheShape(16, 4, 100))
    measure(engine, 100, "it")
    tables = [plan.rows[0].block_table for plan in engine.plans[-2:]]
    assert tables == [list(range(4)), list(range(8))]


def test_slow_models_are_not_measured_for_long() -> None:
    now = [0.0]

    def work(plan: StepPlan) -> None:
        now[0] += 0.6 * plan.num_tokens

    engine = FakeEngine(work)
    engine.allocate(CacheShape(2, 100))
    costs = measure(engine, 100, "it", lambda: now[0])
    assert [plan.num_tokens for plan in engine.plans] == [1, 2, 4]
    assert costs.of(2) == pytest.approx(1.2)
