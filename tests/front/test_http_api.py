"""The text of the metrics, however many ask for it; the rest of the port is in test_health."""

import asyncio
from typing import Any

import pytest

from tgis.front.http_api import _Exposition
from tgis.observe.metrics import Limits, Metrics


class Counting(Metrics):
    """Counts how often its text is made."""

    def __init__(self) -> None:
        super().__init__(Limits(16, 8, 4))
        self.num_made = 0

    def render(self) -> bytes:
        self.num_made += 1
        return super().render()


@pytest.fixture
def metrics() -> Counting:
    return Counting()


async def test_all_who_ask_at_the_same_time_get_one_text(metrics: Counting) -> None:
    exposition = _Exposition(metrics)
    texts = await asyncio.gather(*(exposition.get() for _ in range(100)))
    assert len(set(texts)) == metrics.num_made == 1


async def test_a_text_is_never_older_than_the_question(metrics: Counting) -> None:
    exposition = _Exposition(metrics)
    for number in range(1, 4):
        metrics.count("tgi_request_count", kind="single")
        text = (await exposition.get()).decode()
        assert f'tgi_request_count_total{{kind="single"}} {number}.0' in text
    assert metrics.num_made == 3


async def test_it_rests_in_between(metrics: Counting) -> None:
    exposition, loop = _Exposition(metrics), asyncio.get_running_loop()
    await exposition.get()
    rest_until = exposition._rest_until
    await exposition.get()
    assert rest_until <= loop.time()


async def test_who_gives_up_takes_it_from_nobody(metrics: Counting) -> None:
    exposition = _Exposition(metrics)
    asked: list[asyncio.Task[Any]] = [asyncio.create_task(exposition.get()) for _ in range(2)]
    await asyncio.sleep(0)
    asked[0].cancel()
    assert b"tgi_" in await asked[1]


async def test_a_failure_is_told_to_those_who_asked_only(
    metrics: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    exposition = _Exposition(metrics)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "render", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await exposition.get()
    assert b"tgi_" in await exposition.get()
