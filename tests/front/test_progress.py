"""How loading is reported."""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import cast

import pytest
from tests.kit.waiting import turn_often, until

from tgis.front import progress
from tgis.front.link import CoreLink
from tgis.observe.metrics import Limits, Metrics
from tgis.types import ModelInfo, ModelKind
from tgis.wire import Loading

MODEL = ModelInfo(ModelKind.DECODER_ONLY, "e", "float32", 10, 20, 19, 100, 4)


@dataclass
class FakeLink:
    model: ModelInfo | None = None
    loading: Loading = field(default_factory=lambda: Loading(0, 0))
    changed: asyncio.Event = field(default_factory=asyncio.Event)


def ratio(metrics: Metrics) -> float:
    lines = metrics.render().decode().splitlines()
    (line,) = [x for x in lines if x.startswith("tgi_model_load_ratio ")]
    return float(line.split()[1])


async def test_a_line_each_time_while_there_is_no_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    link, metrics = FakeLink(), Metrics(Limits(16, 8, 4))
    with caplog.at_level(logging.INFO):
        task = asyncio.create_task(progress.report_progress(cast(CoreLink, link), metrics))
        await until(lambda: caplog.records)
        assert caplog.records[0].getMessage() == "waiting for the core, 0 s"
        link.loading = Loading(250_000_000, 1_000_000_000)
        await until(lambda: "25 %, 250 of 1000 MB" in caplog.records[-1].getMessage())
        assert ratio(metrics) == 0.25
        link.model = MODEL
        await until(lambda: ratio(metrics) == 1.0)
        number = len(caplog.records)
        await turn_often()
        assert len(caplog.records) == number  # a server that serves is quiet
        link.model = None
        link.changed.set()
        await until(lambda: len(caplog.records) > number)
    task.cancel()


@pytest.mark.parametrize(
    ("done", "total", "seconds", "line"),
    [
        (0, 0, 3.0, "waiting for the core, 3 s"),
        (0, 4_000_000, 1.0, "loading the model: 0 %, 0 of 4 MB, 1 s"),
        (1_000_000, 4_000_000, 2.0, "loading the model: 25 %, 1 of 4 MB, 2 s, about 6 s left"),
        (4_000_000, 4_000_000, 9.0, "loading the model: 100 %, 4 of 4 MB, 9 s"),
    ],
)
def test_lines(done: int, total: int, seconds: float, line: str) -> None:
    assert progress._line(done, total, seconds) == line
