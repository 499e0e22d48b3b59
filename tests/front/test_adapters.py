"""Which adapter a request names: ids, texts, lookups that are shared, and leases that end."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tgis.errors import InvalidRequest, Overloaded, Unavailable
from tgis.front.adapters import Adapters
from tgis.front.link import CoreLink
from tgis.observe.metrics import Limits, Metrics
from tgis.proto import generation_pb2 as pb
from tgis.types import AdapterKind, Cause
from tgis.wire import Found, Lookup, NotFound


class FakeLink:
    """Keeps what the core would be told."""

    def __init__(self) -> None:
        self.asked: list[Lookup] = []
        self.unpinned: list[int] = []
        self.lookups: Any = None

    def lookup(self, request: Lookup) -> None:
        self.asked.append(request)

    def unpin(self, handle: int) -> None:
        self.unpinned.append(handle)


class House:
    def __init__(self, enabled: bool = True) -> None:
        self.link = FakeLink()
        self.metrics = Metrics(Limits(512, 511, 8))
        link: Any = self.link
        self.adapters = Adapters(link, self.metrics, enabled=enabled)

    def begin(self, **ids: str) -> "asyncio.Task[Any]":
        request = pb.BatchedGenerationRequest(**ids)  # type: ignore[arg-type]
        return asyncio.create_task(self.adapters.lease(request))

    def find(self, lookup: Lookup, handle: int = 5, seconds: float = 0.0) -> None:
        found = Found(lookup.lookup_id, handle, AdapterKind.PROMPT, 3, 4, seconds)
        self.adapters.on_answer(found)

    def sample(self, name: str) -> float:
        lines = self.metrics.render().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


async def settled() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_no_id_is_no_adapter() -> None:
    house = House(enabled=False)
    for request in ({}, {"prefix_id": ""}, {"adapter_id": "", "prefix_id": ""}):
        with await house.begin(**request) as lease:
            assert (lease.handle, lease.num_virtual, lease.length) == (0, 0, 0)
    assert not house.link.asked


async def test_adapter_id_comes_first() -> None:
    house = House()
    task = house.begin(prefix_id="p", adapter_id="a")
    await settled()
    (lookup,) = house.link.asked
    assert lookup.adapter_id == "a"
    house.find(lookup)
    with await task as lease:
        assert (lease.handle, lease.num_virtual, lease.length) == (5, 3, 4)
        assert not house.link.unpinned
    assert house.link.unpinned == [5]


async def test_ids_are_one_however_they_are_written() -> None:
    house = House()
    tasks = [house.begin(prefix_id=name) for name in ("a/b", "a//b", "a/b/")]
    await settled()
    assert [lookup.adapter_id for lookup in house.link.asked] == ["a/b"]
    house.find(house.link.asked[0])
    leases = await asyncio.gather(*tasks)
    for lease in leases[:2]:
        lease.__exit__()
    assert not house.link.unpinned
    leases[2].__exit__()
    leases[2].__exit__()
    assert house.link.unpinned == [5]


async def test_the_next_request_asks_again() -> None:
    """Whether the files are still the same."""
    house = House()
    for number in (1, 2):
        task = house.begin(prefix_id="a")
        await settled()
        assert len(house.link.asked) == number
        house.find(house.link.asked[-1], seconds=0.5 if number == 1 else 0.0)
        with await task:
            pass
    assert house.sample("tgi_prompt_load_duration_count") == 1


async def test_requests_that_go_before_the_answer() -> None:
    house = House()
    first, second = house.begin(prefix_id="a"), house.begin(prefix_id="a")
    await settled()
    first.cancel()
    await settled()
    house.find(house.link.asked[0])
    with await second:
        assert not house.link.unpinned
    assert house.link.unpinned == [5]
    alone = house.begin(prefix_id="b")
    await settled()
    alone.cancel()
    await settled()
    house.find(house.link.asked[1], handle=6)
    assert house.link.unpinned == [5, 6]


async def test_the_core_dies_meanwhile() -> None:
    house = House()
    held = house.begin(prefix_id="held")
    await settled()
    house.find(house.link.asked[0])
    lease = await held
    waiting = house.begin(prefix_id="a")
    await settled()
    house.adapters.on_lost()
    with pytest.raises(Unavailable):
        await waiting
    lease.__exit__()  # the next core knows no such handle, and does not mind
    assert house.sample("tgi_prompt_load_failure") == 0


PREFIX = "can't retrieve prompt prefix with id '{}': "
ADAPTER = "can't retrieve adapter with id '{}': "
SHAPES = "must contain only alphanumeric, _ and - and /"
TEXTS: dict[tuple[str, Cause], str] = {
    ("prefix_id", Cause.MISSING): PREFIX + 'prefix id "{}" not found',
    ("prefix_id", Cause.NO_CONFIG): PREFIX + 'prefix id "{}" not found',
    ("prefix_id", Cause.UNSUPPORTED): PREFIX + "adapter type X is not currently supported",
    ("prefix_id", Cause.INVALID): PREFIX + "X",
    ("adapter_id", Cause.MISSING): ADAPTER + "directory does not exist",
    ("adapter_id", Cause.NO_CONFIG): ADAPTER + "invalid adapter: no adapter_config.json found",
    ("adapter_id", Cause.UNSUPPORTED): "adapter type X is not currently supported",
    ("adapter_id", Cause.INVALID): ADAPTER + "X",
}


@pytest.mark.parametrize(("field", "cause"), TEXTS)
async def test_texts_of_what_the_core_refuses(field: str, cause: Cause) -> None:
    house = House()
    task = house.begin(**{field: "some/id"})
    await settled()
    house.adapters.on_answer(NotFound(house.link.asked[0].lookup_id, cause, "X", None))
    with pytest.raises(InvalidRequest) as refused:
        await task
    assert str(refused.value) == TEXTS[field, cause].format("some/id", "some/id")
    kind = "prompt" if field == "prefix_id" else "lora"
    assert house.sample(f"tgi_{kind}_load_failure") == 1


async def test_what_is_refused_for_want_of_room_may_be_tried_again() -> None:
    house = House()
    task = house.begin(prefix_id="a")
    await settled()
    house.adapters.on_answer(NotFound(1, Cause.BUSY, "full", AdapterKind.LORA))
    with pytest.raises(Overloaded, match="full"):
        await task
    assert house.sample("tgi_lora_load_failure") == 1


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ({"prefix_id": "a.b"}, PREFIX.format("a.b") + f"Invalid prefix id a.b, {SHAPES}"),
        ({"prefix_id": "/a"}, PREFIX.format("/a") + "Invalid prefix id /a"),
        ({"prefix_id": "a\n"}, PREFIX.format(r"a\n") + rf"Invalid prefix id a\n, {SHAPES}"),
        ({"adapter_id": "a\0"}, rf"Invalid adapter id 'a\x00', {SHAPES}"),
        ({"adapter_id": "/a"}, f"Invalid adapter id '/a', {SHAPES}"),
        ({"adapter_id": "\u2024\u2024/a"}, f"Invalid adapter id '\u2024\u2024/a', {SHAPES}"),
    ],
)
async def test_ids_that_are_not_looked_up(ids: dict[str, str], text: str) -> None:
    house = House()
    with pytest.raises(InvalidRequest) as refused:
        await house.begin(**ids)
    assert str(refused.value) == text
    assert not house.link.asked


async def test_without_a_store() -> None:
    house = House(enabled=False)
    for ids, text in {
        "prefix_id": "can't retrieve prompt prefix with id 'a': "
        "prompt prefixes are not enabled on this server",
        "adapter_id": "adapter_id supplied but no adapter store was configured",
    }.items():
        with pytest.raises(InvalidRequest) as refused:
            await house.begin(**{ids: "a"})
        assert str(refused.value) == text


async def test_hostile_ids_grow_nothing() -> None:
    """What is asked for of them is answered, and forgotten."""
    house, chance = House(), random.Random(3)
    letters = "ab/._-\0\n\u2024\uff0e\u202e "
    for number in range(10_000):
        length = 1 << 20 if number % 1000 == 0 else chance.randint(1, 12)
        text = chance.choice(letters) * length if length > 20 else ""
        text = text or "".join(chance.choices(letters, k=length))
        task = house.begin(**{chance.choice(["prefix_id", "adapter_id"]): text})
        await settled()
        if house.link.asked:
            lookup = house.link.asked.pop()
            assert len(lookup.adapter_id) <= 1024
            assert not set(lookup.adapter_id) & set(letters[3:4] + letters[6:])
            assert not lookup.adapter_id.startswith("/")
            missing = NotFound(lookup.lookup_id, Cause.MISSING, "", None)
            house.adapters.on_answer(missing)
        with pytest.raises(InvalidRequest) as refused:
            await task
        assert len(str(refused.value)) < 700
        assert str(refused.value).isprintable()
    assert not house.adapters._waiting
    assert not house.adapters._lookups


async def test_lookups_are_bounded() -> None:
    house = House()
    tasks = [house.begin(prefix_id=f"a{number}") for number in range(300)]
    await settled()
    assert len(house.link.asked) == 256
    for lookup in house.link.asked:
        house.find(lookup)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, Overloaded) for result in results) == 44


def test_a_link_tells_of_answers(tmp_path: Path) -> None:
    ears: Any = None
    link = CoreLink(tmp_path / "none", ears)
    adapters = Adapters(link, Metrics(Limits(512, 511, 8)), enabled=True)
    assert link.lookups is adapters
    with pytest.raises(Unavailable):
        link.lookup(Lookup(1, "a"))
    link.unpin(3)  # nobody to tell
