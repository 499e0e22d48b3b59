"""Which replica a prompt goes to."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tgis.cluster.affinity import BOUND, MARK, NO_KEY, Ring, choose, key_in, key_of
from tgis.proto import generation_pb2 as pb

NAMES = [f"replica {number}" for number in range(20)]


def stream(text: str, **fields: str) -> pb.SingleGenerationRequest:
    return pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), **fields)


def batch(*texts: str) -> pb.BatchedGenerationRequest:
    return pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text=t) for t in texts])


def key(number: int) -> bytes:
    return key_of(stream(f"prompt {number}"))


def test_prompts_that_begin_alike_have_one_key() -> None:
    system = "You are a helpful storyteller. " * 20
    assert key_of(stream(system + "a")) == key_of(stream(system + "b"))
    assert key_of(stream(system + "a")) == key_of(batch(system + "a", "c"))
    assert key_of(stream("a")) != key_of(stream("b"))
    assert len(key_of(batch())) == 8


def test_what_is_cached_apart_has_keys_of_its_own() -> None:
    keys = {
        key_of(stream("a")),
        key_of(stream("a", adapter_id="x")),
        key_of(stream("a", prefix_id="x")),
    }
    assert len(keys) == 3


@given(st.binary(max_size=40), st.binary(min_size=8, max_size=8), st.binary(max_size=40))
def test_the_key_is_found_in_whatever_is_around_it(head: bytes, value: bytes, body: bytes) -> None:
    if MARK in head + MARK[:-1]:
        return
    assert key_in(head + MARK + value + body) == value


def test_no_key() -> None:
    assert key_in(b"") == key_in(b"something else") == NO_KEY


def test_every_replica_is_walked_once_in_an_order_of_the_keys() -> None:
    ring = Ring(NAMES)
    orders = [list(ring.walk(key(number))) for number in range(200)]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    assert list(Ring(reversed(NAMES)).walk(key(0))) == orders[0]
    shares = Counter(order[0] for order in orders)
    assert len(shares) >= 18
    assert max(shares.values()) < 40


def test_few_prompts_move_when_a_replica_goes() -> None:
    before, after = Ring(NAMES), Ring(NAMES[1:])
    for number in range(200):
        first, second, *_ = before.walk(key(number))
        expected = second if first == NAMES[0] else first
        assert next(after.walk(key(number))) == expected


def test_an_empty_ring_has_nobody() -> None:
    assert list(Ring([]).walk(key(0))) == []


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_the_chosen_replica_has_not_much_more_than_the_others(loads: list[int]) -> None:
    names = NAMES[: len(loads)]
    mean = sum(loads) / len(loads)
    by_name = dict(zip(names, loads, strict=True))
    chosen = choose(names, by_name.__getitem__, mean)
    assert chosen is not None  # one always has no more than the mean
    assert by_name[chosen] < BOUND * mean + 1
    passed = names[: names.index(chosen)]
    assert all(by_name[name] >= BOUND * mean + 1 for name in passed)


def test_the_first_is_chosen_when_nobody_works() -> None:
    assert choose(["a", "b"], lambda _: 0, 0.0) == "a"


def test_nobody_is_chosen_when_all_are_too_busy() -> None:
    assert choose(["a"], lambda _: 3, 1.0) is None
