"""Tenants share the engine: turns, catching up, memory of who was here."""

import dataclasses

import msgspec
import pytest
from tests.kit.scheduling import Driver, request

from tgis.core.sequence import Sequence
from tgis.core.waiting import _MOST_KNOWN, Waiting


def seq_of(uid: int, tenant: bytes = b"") -> Sequence:
    return Sequence.of(uid, msgspec.structs.replace(request(uid), tenant=tenant), 0)


def in_turn(waiting: Waiting) -> list[int]:
    return [seq.uid for seq in waiting]


def test_without_tenants_first_come_first_served() -> None:
    waiting = Waiting()
    seqs = [seq_of(uid) for uid in range(5)]
    for seq in seqs:
        waiting.arrive(seq)
    waiting.serve(seqs[0], 100)
    assert in_turn(waiting) == [0, 1, 2, 3, 4]
    waiting.take(seqs[0])
    waiting.put_back(seqs[0])
    assert in_turn(waiting) == [0, 1, 2, 3, 4]


def test_the_least_served_tenant_is_next_and_serving_changes_the_turn() -> None:
    waiting = Waiting()
    for uid in range(6):
        waiting.arrive(seq_of(uid, b"many"))
    for uid in (10, 11):
        waiting.arrive(seq_of(uid, b"few"))
    turns = []
    for seq in waiting:
        turns.append(seq.uid)
        waiting.serve(seq, 10)
    assert turns == [0, 10, 1, 11, 2, 3, 4, 5]


def test_who_comes_back_brings_no_old_advantage() -> None:
    waiting = Waiting()
    early, busy = seq_of(1, b"early"), seq_of(2, b"busy")
    waiting.arrive(early)
    waiting.take(early)
    waiting.leave(early)
    waiting.arrive(busy)
    waiting.serve(busy, 1000)
    again, other = seq_of(3, b"early"), seq_of(4, b"busy")
    waiting.arrive(again)
    waiting.arrive(other)
    waiting.serve(again, 1)
    assert in_turn(waiting) == [2, 4, 3]


def test_tenants_that_are_away_are_not_remembered_for_ever() -> None:
    waiting = Waiting()
    stays = seq_of(0, b"stays")
    waiting.arrive(stays)
    for number in range(2 * _MOST_KNOWN):
        seq = seq_of(number + 1, str(number).encode())
        waiting.arrive(seq)
        waiting.take(seq)
        waiting.leave(seq)
    assert len(waiting._tenants) <= _MOST_KNOWN
    assert in_turn(waiting) == [0]
    assert len(waiting) == 1


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_two_tenants_get_equal_numbers_of_tokens(slots: int) -> None:
    """One asks for a hundred times as much as the other, which always has something waiting."""
    driver = Driver.make(slots=slots, tokens=2000, budget=64)
    shares = dict.fromkeys((b"many", b"few"), 0)
    number = 0

    def ask(tenant: bytes) -> None:
        nonlocal number
        number += 1
        driver.add(msgspec.structs.replace(request(number, max_new=8), tenant=tenant))

    for _ in range(800):
        ask(b"many")
    while sum(shares.values()) < 3000:
        while sum(seq.request.tenant == b"few" for seq in driver.live.values()) < slots + 1:
            ask(b"few")
        before = {uid: (s.request.tenant, s.num_generated) for uid, s in driver.live.items()}
        live = dict(driver.live)
        driver.step()
        for uid, (tenant, generated) in before.items():
            shares[tenant] += live[uid].num_generated - generated
    assert 0.45 < shares[b"few"] / sum(shares.values()) < 0.55


def test_prefixes_of_one_tenant_are_not_those_of_another() -> None:
    driver = Driver.make(slots=2, tokens=400, budget=64)
    prompt = [i % 29 for i in range(64)]
    for number, tenant in enumerate((b"one", b"one", b"two", b"")):
        add = request(number, prompt=prompt, max_new=2)
        driver.add(msgspec.structs.replace(add, tenant=tenant))
        driver.run()
        hits = driver.scheduler.drain_counts().prefix_hit_tokens
        assert bool(hits) == (number == 1), tenant


def test_a_held_sequence_waits_and_the_others_go_on() -> None:
    driver = Driver.make(slots=3, budget=64)
    held = driver.add(request(1, max_new=6))
    driver.add(request(2, max_new=6))
    driver.step()
    held.held = True
    for _ in range(10):
        driver.step()
    assert held.num_generated == 1
    assert 2 in driver.done
    assert driver.scheduler.has_work
    assert not driver.step().rows
    held.held = False
    driver.run()
    assert len(driver.done[1][0]) == 6


def test_a_held_sequence_expires_and_can_be_preempted() -> None:
    driver = Driver.make(slots=2, budget=64)
    held = driver.add(request(1, max_new=50, deadline=3.0))
    driver.step()
    held.held = True
    while driver.live:
        driver.step()
        driver.expire()
    assert driver.now < 6
    assert dataclasses.asdict(held)["slot"] == -1
