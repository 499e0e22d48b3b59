"""Blocks: shared by reference, evicted leaves first; contents are checked by the driver."""

import pytest
from tests.kit.fake_engine import continuation
from tests.kit.scheduling import Driver, request

from tgis.core.kv.blocks import BlocksMemory
from tgis.core.sequence import Sequence
from tgis.types import DetailParams

BLOCK = 4
SYSTEM = [(5 * i) % 31 for i in range(6 * BLOCK)]


def make(tokens: int = 400, slots: int = 4, **options: bool) -> Driver:
    return Driver.make(slots, tokens, budget=200, block_tokens=BLOCK, **options)


def test_running_sequences_share_blocks_without_copies() -> None:
    driver = make()
    driver.add(request(1, prompt=[*SYSTEM, 1], max_new=20))
    driver.step()
    used = driver.memory.used
    driver.add(request(2, prompt=[*SYSTEM, 2], max_new=20))
    plan = driver.step()
    assert plan.copies == []
    assert plan.rows[1].start == len(SYSTEM)
    assert driver.memory.used == used + BLOCK
    first, second = driver.live[1].block_table, driver.live[2].block_table
    assert first[:6] == second[:6]
    assert first[6] != second[6]
    driver.run()
    for seq_id in (1, 2):
        assert driver.done[seq_id][0] == continuation([*SYSTEM, seq_id], 20)


def test_the_same_prompt_again_computes_its_last_block() -> None:
    driver = make()
    for seq_id in (1, 2):
        driver.add(request(seq_id, prompt=SYSTEM, max_new=1))
        plan = driver.step()
    assert plan.rows[0].start == len(SYSTEM) - BLOCK
    assert driver.done[2] == driver.done[1]


def test_the_ends_of_prefixes_are_evicted_first() -> None:
    driver = make(tokens=12 * BLOCK)
    driver.add(request(1, prompt=SYSTEM, max_new=1))
    driver.run()
    assert driver.memory.cached == len(SYSTEM)
    driver.add(request(2, prompt=[30] * (9 * BLOCK), max_new=1))
    driver.run()
    driver.add(request(3, prompt=[*SYSTEM, 1], max_new=1))
    assert driver.step().rows[0].start == 3 * BLOCK


@pytest.mark.parametrize(
    ("caching", "salt", "details", "hit"),
    [
        (True, b"", DetailParams(), True),
        (True, b"adapter", DetailParams(), False),
        (False, b"", DetailParams(), False),
        (True, b"", DetailParams(ranks=True, input=True), False),
    ],
)
def test_who_may_share(caching: bool, salt: bytes, details: DetailParams, hit: bool) -> None:
    driver = make(caching=caching)
    driver.add(request(1, prompt=SYSTEM, max_new=1))
    driver.run()
    assert driver.memory.cached == (len(SYSTEM) if caching else 0)
    driver.add(request(2, prompt=[*SYSTEM, 1], details=details), salt)
    assert (driver.step().rows[0].start > 0) == hit
    driver.drop(2)


def test_a_failed_sequence_takes_only_its_own_blocks_along() -> None:
    driver = make()
    for seq_id in (1, 2):
        driver.add(request(seq_id, prompt=[*SYSTEM, seq_id], max_new=20))
        driver.step()
    driver.drop(2, keep=False)
    driver.run()
    assert driver.done[1][0] == continuation([*SYSTEM, 1], 20)
    driver.add(request(3, prompt=[*SYSTEM, 2], max_new=2))
    assert driver.step().rows[0].start == len(SYSTEM)
    driver.run()


def test_no_slot_or_no_room_changes_nothing() -> None:
    memory = BlocksMemory(1, 4, BLOCK)
    first, second = (Sequence.of(i, request(i, prompt=[i] * 8), 0) for i in (1, 2))
    assert memory.open(first, 8)
    assert not memory.open(second, 4)
    assert not memory.reserve(first, 17)
    assert (memory.used, memory.free) == (8, 8)
    assert memory.check() is None
    memory.close(first)
    assert not memory.open(second, 17)
    assert (memory.used, memory.free, memory.cached) == (0, 16, 0)


def test_check_finds_what_is_wrong() -> None:
    memory = BlocksMemory(2, 8, BLOCK)
    seq = Sequence.of(1, request(1, prompt=[1] * 8), 0)
    memory.open(seq, 8)
    memory._num_refs[seq.block_table[0]] += 1
    assert memory.check()
