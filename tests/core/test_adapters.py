"""Loaded adapters: who holds them, which go, and that no sequence ever gets another one's."""

import math
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.kit.core_house import Front, House, open_house
from tests.kit.fake_engine import continuation

from tgis.adapters.load import Rules
from tgis.adapters.prompts import PromptRules
from tgis.adapters.store import Store
from tgis.core.adapters import Adapters
from tgis.core.link import FrontLink
from tgis.engines.base import Engine
from tgis.types import NO_DETAILS, AdapterKind, Cause, FinishReason, ModelKind, SamplingParams
from tgis.wire import Abort, Add, FailureKind, Found, Lookup, NotFound, Unpin

ROOM = 1024  # two prompts of up to 512 bytes
LONG = list(range(1, 31)) + list(range(30, 0, -1))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def save(store: Path, name: str, *values: int) -> None:
    """A prompt whose embeddings stand for these token ids, in the fake engine."""
    (store / name).mkdir(parents=True, exist_ok=True)
    new = store / name / "new"
    torch.save(torch.tensor(values, dtype=torch.float32)[:, None], new)
    new.rename(store / name / "decoder.pt")


@pytest.fixture
def house(tmp_path: Path, store: Path) -> Iterator[House]:
    def make(engine: Engine, link: FrontLink) -> Adapters:
        rules = Rules(PromptRules(ModelKind.DECODER_ONLY, 1, torch.float32, 20), None)
        limits = {AdapterKind.PROMPT: ROOM, AdapterKind.LORA: 0}
        return Adapters(Store(str(store)), rules, limits, engine, link)

    for name, values in {"a": (7, 8), "b": (9,), "c": (3, 4, 5)}.items():
        save(store, name, *values)
    with open_house(tmp_path, tokens=600, budget=24, make_adapters=make) as house:
        yield house


def look_up(house: House, front: Front, lookup_id: int, name: str) -> Found | NotFound:
    front.send(Lookup(lookup_id, name))
    while lookup_id not in front.answers:
        house.core.turn(5.0)  # until the loader rings
        front.read()
    return front.answers[lookup_id]


def found(house: House, front: Front, lookup_id: int, name: str) -> Found:
    answer = look_up(house, front, lookup_id, name)
    assert isinstance(answer, Found), answer
    return answer


def add(seq_id: int, ids: list[int], handle: int, max_new: int = 4) -> Add:
    return Add(seq_id, ids, SamplingParams(), NO_DETAILS, max_new, math.inf, 0.0, adapter=handle)


def test_sequences_with_two_prompts_and_none_in_one_batch(house: House) -> None:
    """Twice, and long enough for prefixes to be cached: those of another prompt are not taken."""
    front = house.connect()
    handles = {
        name: found(house, front, number, name).handle for number, name in enumerate(["a", "b"])
    }
    beginnings = {handles["a"]: [7, 8], handles["b"]: [9], 0: []}
    for turn in (0, 10):
        for number, handle in enumerate(beginnings, start=turn):
            front.send(add(number, LONG, handle))
            front.send(add(number + 100, [5], handle))
        house.run(front)
        for number, values in enumerate(beginnings.values(), start=turn):
            assert front.tokens[number] == continuation([*values, *LONG], 4)
            assert front.tokens[number + 100] == continuation([*values, 5], 4)
    assert set(front.finish.values()) == {FinishReason.MAX_TOKENS}


def test_prompts_of_one_length_share_no_prefix(house: House, store: Path) -> None:
    """One after the other, the same input after as many virtual tokens: only the salt differs."""
    save(store, "d", 5, 6)
    front = house.connect()
    for number, (name, values) in enumerate({"a": (7, 8), "d": (5, 6)}.items()):
        front.send(add(number, LONG, found(house, front, number, name).handle))
        house.run(front)
        assert front.tokens[number] == continuation([*values, *LONG], 4)


def test_what_a_front_is_told(house: House) -> None:
    front = house.connect()
    first = found(house, front, 1, "c")
    assert (first.kind, first.num_virtual, first.length) == (AdapterKind.PROMPT, 3, 3)
    assert first.seconds > 0
    again = found(house, front, 2, "c")
    assert again.handle == first.handle
    assert again.seconds == 0
    assert list(house.engine.attached) == [first.handle]


@pytest.mark.parametrize(
    ("name", "cause"),
    [("none", Cause.MISSING), ("empty", Cause.NO_CONFIG), ("broken", Cause.INVALID)],
)
def test_what_cannot_be_loaded(house: House, store: Path, name: str, cause: Cause) -> None:
    (store / "empty").mkdir()
    (store / "broken").mkdir()
    (store / "broken" / "decoder.pt").write_bytes(b"no")
    front = house.connect()
    for lookup_id in (1, 2):  # failures are not kept
        answer = look_up(house, front, lookup_id, name)
        assert isinstance(answer, NotFound)
        assert answer.cause is cause
    assert not house.engine.attached
    assert house.core.check() is None


def test_the_one_used_longest_ago_goes(house: House) -> None:
    front = house.connect()
    handles = {}
    for number, name in enumerate(["a", "b", "a"]):
        handles[name] = found(house, front, number, name).handle
        front.send(Unpin(handles[name]))
    house.turn()
    handles["c"] = found(house, front, 3, "c").handle
    assert set(house.engine.attached) == {handles["a"], handles["c"]}
    assert found(house, front, 4, "a").seconds == 0


def test_no_room_while_all_are_held(house: House) -> None:
    front = house.connect()
    held = [found(house, front, number, name).handle for number, name in enumerate("ab")]
    answer = look_up(house, front, 2, "c")
    assert isinstance(answer, NotFound)
    assert answer.cause is Cause.BUSY
    front.send(Unpin(held[0]))
    assert found(house, front, 3, "c").handle in house.engine.attached
    assert held[0] not in house.engine.attached
    assert held[1] in house.engine.attached


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (MemoryError("1 GiB"), Cause.BUSY, "there is no memory for it"),
        (RuntimeError("secret"), Cause.INVALID, "RuntimeError"),
    ],
)
def test_an_engine_that_does_not_take_it(
    house: House, error: Exception, cause: Cause, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach(handle: int, adapter: object) -> None:
        raise error

    front = house.connect()
    with monkeypatch.context() as patch:
        patch.setattr(house.engine, "attach", attach)
        answer = look_up(house, front, 1, "a")
    assert isinstance(answer, NotFound)
    assert (answer.cause, answer.message) == (cause, message)
    assert found(house, front, 2, "a").seconds > 0


def test_larger_than_the_cache(house: House, store: Path) -> None:
    rules = PromptRules(ModelKind.DECODER_ONLY, 1, torch.float32, 1000)
    house.core._adapters._rules = Rules(rules, None)  # type: ignore[union-attr]
    save(store, "large", *([1] * 300))
    answer = look_up(house, house.connect(), 1, "large")
    assert isinstance(answer, NotFound)
    assert answer.message == "Prefix ID object large exceeds the allowed cache size"


def test_a_running_sequence_holds_its_own(house: House) -> None:
    front = house.connect()
    handle = found(house, front, 1, "a").handle
    front.send(add(1, [5, 6], handle, max_new=150))
    front.send(Unpin(handle))
    house.turn(2)
    other = found(house, front, 2, "b")
    assert isinstance(look_up(house, front, 3, "c"), NotFound)
    front.send(Unpin(other.handle))
    found(house, front, 4, "c")
    assert handle in house.engine.attached
    house.run(front)
    assert front.tokens[1] == continuation([7, 8, 5, 6], 150)


def test_a_replaced_file_is_another_adapter(house: House, store: Path) -> None:
    front = house.connect()
    old = found(house, front, 1, "a").handle
    front.send(add(1, [5, 6], old, max_new=150))
    house.turn(2)
    save(store, "a", 1, 2)
    new = found(house, front, 2, "a")
    assert new.handle != old
    assert new.seconds > 0
    front.send(add(2, [5, 6], new.handle, max_new=150))
    front.send(Unpin(old))
    house.turn()
    assert set(house.engine.attached) == {old, new.handle}
    house.run(front)
    assert front.tokens[1] == continuation([7, 8, 5, 6], 150)
    assert front.tokens[2] == continuation([1, 2, 5, 6], 150)
    assert set(house.engine.attached) == {new.handle}


def test_a_removed_file_is_gone_at_once(house: House, store: Path) -> None:
    front = house.connect()
    handle = found(house, front, 1, "a").handle
    front.send(Unpin(handle))
    shutil.rmtree(store / "a")
    answer = look_up(house, front, 2, "a")
    assert isinstance(answer, NotFound)
    assert answer.cause is Cause.MISSING
    assert not house.engine.attached


@pytest.mark.parametrize("handle", [1, 2**60])
def test_a_handle_that_is_not_there(house: House, handle: int) -> None:
    front = house.connect()
    front.send(add(1, [5], handle))
    front.send(Unpin(handle))
    house.turn(3)
    house.run(front)
    assert front.failed[1].kind is FailureKind.UNAVAILABLE
    assert "not loaded any more" in front.failed[1].message


def test_a_front_that_leaves_holds_nothing(house: House) -> None:
    front, other = house.connect(), house.connect()
    handle = found(house, front, 1, "a").handle
    found(house, front, 2, "a")
    front.send(add(1, [5], handle, max_new=50))
    kept = found(house, other, 1, "b")
    house.turn()
    front.sock.shutdown(socket.SHUT_RDWR)
    house.turn(2)
    assert house.core.check() is None
    found(house, other, 2, "c")
    assert handle not in house.engine.attached
    assert kept.handle in house.engine.attached


def test_lookups_at_the_same_time_load_once(house: House) -> None:
    fronts = [house.connect(), house.connect()]
    for lookup_id in range(20):
        for front in fronts:
            front.send(Lookup(lookup_id, "a"))
    while any(len(front.answers) < 20 for front in fronts):
        house.core.turn(5.0)
        for front in fronts:
            front.read()
    answers = [answer for front in fronts for answer in front.answers.values()]
    assert len({answer.handle for answer in answers if isinstance(answer, Found)}) == 1
    assert len(house.engine.attached) == 1
    assert sum(answer.seconds > 0 for answer in answers if isinstance(answer, Found)) == 1


@pytest.mark.parametrize("seed", range(6))
def test_anything_in_any_order(house: House, store: Path, seed: int) -> None:
    """Lookups, sequences, replaced files, aborts: each sequence gets the prompt of its handle."""
    chance, front = random.Random(seed), house.connect()
    values: dict[int, list[int]] = {0: []}  # handle -> prompt
    pins: list[int] = []
    expected: dict[int, list[int]] = {}
    current = {"a": [7, 8], "b": [9], "c": [3, 4, 5]}
    for number in range(150):
        what = chance.random()
        if what < 0.3:
            name = chance.choice("abc")
            answer = look_up(house, front, number, name)
            if isinstance(answer, Found):
                assert values.setdefault(answer.handle, current[name]) == current[name]
                pins.append(answer.handle)
        elif what < 0.6:
            handle = chance.choice([0, *pins])
            ids = [chance.randrange(20) for _ in range(chance.randint(1, 40))]
            expected[number] = continuation([*values[handle], *ids], 5)
            front.send(add(number, ids, handle, 5))
        elif what < 0.8 and pins:
            front.send(Unpin(pins.pop(chance.randrange(len(pins)))))
        elif what < 0.85:
            name = chance.choice("abc")
            current[name] = [chance.randrange(20) for _ in range(chance.randint(1, 5))]
            save(store, name, *current[name])
        elif what < 0.9 and expected:
            front.send(Abort([chance.choice(list(expected))]))
        house.turn(chance.randint(0, 2))
    for handle in pins:
        front.send(Unpin(handle))
    house.run(front)
    assert not front.failed
    assert len(front.tokens) > 20
    for seq_id, tokens in front.tokens.items():
        assert tokens == expected[seq_id][: len(tokens)]
        assert len(tokens) == 5 or seq_id not in front.finish
    assert len(house.engine.attached) <= 2
    assert house.core.check() is None
