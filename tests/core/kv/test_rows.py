"""Rows: who takes over, who copies, who is evicted; contents are checked by the driver."""

import pytest
from tests.kit.fake_engine import continuation
from tests.kit.scheduling import Driver, request

from tgis.core.kv.rows import RUN_TOKENS, RowsMemory
from tgis.core.sequence import Sequence
from tgis.engines.plan import KvCopy
from tgis.types import DetailParams

SYSTEM = [(5 * i) % 31 for i in range(3 * RUN_TOKENS)]


def ended(driver: Driver, seq_id: int, prompt: list[int], max_new: int = 1) -> None:
    driver.add(request(seq_id, prompt=prompt, max_new=max_new))
    driver.run()
    assert driver.done[seq_id][0] == continuation(prompt, max_new)


def test_the_next_turn_of_a_chat_takes_the_whole_row_over() -> None:
    driver = Driver.make(tokens=400, budget=200)
    ended(driver, 1, SYSTEM, max_new=9)
    history = SYSTEM + driver.done[1][0]
    assert driver.memory.cached == len(history) - 1
    driver.add(request(2, prompt=[*history, 3, 4, 5], max_new=4))
    plan = driver.step()
    # All but the token that was never computed, and what the user added.
    assert plan.rows[0].start == len(history) - 1
    assert plan.copies == []
    assert driver.memory.cached == 0
    driver.run()


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    driver = Driver.make(tokens=400, budget=200)
    ended(driver, 1, SYSTEM)
    driver.add(request(2, prompt=SYSTEM))
    (row,) = driver.step().rows
    assert (row.start, row.token_ids) == (len(SYSTEM) - 1, SYSTEM[-1:])
    driver.run()
    assert driver.done[2][0] == continuation(SYSTEM, 5)


def test_a_row_in_use_is_copied_from() -> None:
    driver = Driver.make(tokens=600, budget=200)
    driver.add(request(1, prompt=SYSTEM, max_new=20))
    driver.step()
    driver.add(request(2, prompt=[*SYSTEM, 1, 2], max_new=20))
    plan = driver.step()
    source, target = driver.live[1].slot, driver.live[2].slot
    assert plan.copies == [KvCopy(source, target, len(SYSTEM))]
    driver.run()
    assert driver.done[2][0] == continuation([*SYSTEM, 1, 2], 20)


def test_a_row_that_shares_less_than_half_is_copied_from_and_stays() -> None:
    driver = Driver.make(tokens=1000, budget=500)
    ended(driver, 1, SYSTEM + [7] * 200)
    driver.add(request(2, prompt=[*SYSTEM, 1], max_new=1))
    plan = driver.step()
    assert [copy.num_tokens for copy in plan.copies] == [len(SYSTEM)]
    assert driver.memory.cached == len(SYSTEM) + 200 + len(SYSTEM) + 1


def test_the_source_of_a_copy_is_not_evicted_by_the_same_step() -> None:
    driver = Driver.make(slots=4, tokens=400, budget=500)
    ended(driver, 1, SYSTEM + [7] * 150)  # the oldest: first to be evicted
    ended(driver, 2, [9] * 40)
    driver.add(request(3, prompt=[*SYSTEM, 1], max_new=1))
    driver.add(request(4, prompt=[8] * 30, max_new=1))
    plan = driver.step()
    assert len(plan.copies) == 1
    assert {3, 4} <= set(driver.done)
    assert driver.done[3][0] == continuation([*SYSTEM, 1], 1)


def test_the_least_recently_used_row_is_evicted_first() -> None:
    driver = Driver.make(tokens=300, budget=500)
    prompts = [[number] * 80 for number in range(4)]
    for number in (0, 1, 2):
        ended(driver, number, prompts[number])
    ended(driver, 10, prompts[0])  # used again
    ended(driver, 3, prompts[3])  # evicts 1
    for seq_id, number, hit in ((20, 0, 79), (22, 2, 79), (21, 1, 0)):
        driver.add(request(seq_id, prompt=prompts[number], max_new=1))
        assert driver.step().rows[0].start == hit


def test_evicted_rows_are_released_before_the_step_that_reuses_them() -> None:
    memory = RowsMemory(1, 100)
    first = Sequence.of(1, request(1, prompt=[1] * 64), 0)
    assert memory.open(first, 64)
    first.num_computed = 64
    memory.close(first)
    assert memory.drain_released() == []
    second = Sequence.of(2, request(2, prompt=[2] * 64), 0)
    assert memory.open(second, 64)
    assert memory.drain_released() == [second.slot] == [0]


def test_what_was_written_counts_even_if_less_of_it_is_shared() -> None:
    memory = RowsMemory(2, 1000)
    first = Sequence.of(1, request(1, prompt=[1] * 64 + [2] * 36), 0)
    assert memory.open(first, 100)
    first.num_computed = 100
    memory.close(first)
    second = Sequence.of(2, request(2, prompt=[1] * 64 + [3]), 0)
    assert memory.open(second, 65)
    assert second.num_computed == 64
    assert memory.used == second.room == 100, "the pages of the longer row are still there"
    memory.close(second)
    assert memory.cached == 100


@pytest.mark.parametrize(
    ("caching", "salt", "details", "hit"),
    [
        (True, b"", DetailParams(), True),
        (True, b"adapter", DetailParams(), False),
        (False, b"", DetailParams(), False),
        (True, b"", DetailParams(logprobs=True, input=True), False),
    ],
)
def test_who_may_share(caching: bool, salt: bytes, details: DetailParams, hit: bool) -> None:
    driver = Driver.make(tokens=400, budget=200, caching=caching)
    ended(driver, 1, SYSTEM)
    driver.add(request(2, prompt=[*SYSTEM, 1], details=details), salt)
    start = driver.step().rows[0].start
    assert (start > 0) == hit
    counts = driver.scheduler.drain_counts()
    assert counts.prefix_hit_tokens == start
    assert (counts.prefix_query_tokens > 0) == caching
    driver.drop(2)


def test_a_failed_row_leaves_nothing_behind() -> None:
    driver = Driver.make(tokens=400, budget=200)
    driver.add(request(1, prompt=SYSTEM, max_new=9))
    driver.step()
    driver.drop(1, keep=False)
    assert driver.memory.cached == driver.memory.used == 0


def test_a_cancelled_prompt_leaves_what_was_computed() -> None:
    driver = Driver.make(tokens=400, budget=40)
    driver.add(request(1, prompt=SYSTEM, max_new=9))
    driver.step()
    driver.drop(1)
    assert driver.memory.cached == 40
    driver.add(request(2, prompt=SYSTEM, max_new=9))
    assert driver.step().rows[0].start == 40
    driver.run()


def test_reservations_are_whole_granules() -> None:
    memory = RowsMemory(4, 1000, granule=32)
    assert memory.total == 992
    seq = Sequence.of(1, request(1, prompt=[1] * 33), 0)
    assert memory.open(seq, 33)
    assert memory.used == seq.room == 64
    assert memory.reserve(seq, 64)
    assert memory.used == 64
    assert memory.reserve(seq, 65)
    assert memory.used == seq.room == 96
    assert not memory.reserve(seq, 1000)
    assert memory.used == 96
    assert memory.check() is None


def test_a_preempted_sequence_finds_its_row_again() -> None:
    driver = Driver.make(slots=2, tokens=160, budget=200, horizon=0)
    for seq_id, length in ((1, 70), (2, 70)):
        driver.add(request(seq_id, prompt=[seq_id] * length, max_new=40))
    driver.run()
    assert driver.scheduler.drain_counts().num_preempted
    for seq_id in (1, 2):
        assert driver.done[seq_id][0] == continuation([seq_id] * 70, 40)


def test_check_finds_what_is_wrong() -> None:
    memory = RowsMemory(4, 1000)
    seq = Sequence.of(1, request(1, prompt=[1] * 64), 0)
    memory.open(seq, 64)
    memory._used += 1
    assert memory.check()
    memory._used -= 1
    seq.num_computed = 64
    memory.commit(seq)
    assert memory.check() is None
    memory._index.clear()
    assert memory.check()
