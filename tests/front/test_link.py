"""The front's end of the link, against a core that is a bare socket."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tgis.errors import Unavailable
from tgis.front.link import CoreLink
from tgis.types import NO_DETAILS, ModelInfo, ModelKind, SamplingParams
from tgis.wire import (
    Abort,
    Add,
    Beat,
    Decoder,
    Failed,
    FailureKind,
    Gauges,
    Loading,
    Out,
    Ready,
    ToCore,
    encode,
)

MODEL = ModelInfo(ModelKind.DECODER_ONLY, "e", "float32", 10, 20, 19, 100, 4)
ADD = Add(1, [1], SamplingParams(), NO_DETAILS, 5, math.inf, 0.0)


@dataclass
class Ears:
    """Hears what the link hears."""

    heard: list[object] = field(default_factory=list)
    lost: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_out(self, out: Out) -> None:
        self.heard.append(out)
        self.news.set()

    def on_gauges(self, gauges: Gauges) -> None:
        self.heard.append(gauges)
        self.news.set()

    def on_failed(self, failed: Failed) -> None:
        self.heard.append(failed)
        self.news.set()

    def on_lost(self) -> None:
        self.lost += 1
        self.news.set()


class BareCore:
    """Accepts fronts on a socket and keeps their messages."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.writer: asyncio.StreamWriter
        self.connected = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.connected.set()
        decoder: Decoder[object] = Decoder(ToCore)
        while data := await reader.read(1000):
            for message in decoder.feed(data):
                self.messages.put_nowait(message)

    @contextlib.asynccontextmanager
    async def serve(self, path: Path) -> AsyncIterator[None]:
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self, str(path))
        await self.connected.wait()
        try:
            yield
        finally:
            server.close()
            self.writer.close()
            await server.wait_closed()


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[tuple[Path, Ears, CoreLink]]:
    path, ears = tmp_path / "core.sock", Ears()
    link = CoreLink(path, ears)
    task = asyncio.create_task(link.run())
    yield path, ears, link
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def ready(core: BareCore, link: CoreLink) -> None:
    changed = link.changed
    core.writer.write(encode(Ready(MODEL)))
    await changed.wait()


async def test_messages_both_ways(parts: tuple[Path, Ears, CoreLink]) -> None:
    path, ears, link = parts
    core = BareCore()
    async with core.serve(path):
        core.writer.write(encode(Loading(1, 4)))
        await ready(core, link)
        assert link.model == MODEL
        assert link.loading == Loading(1, 4)
        link.add(ADD)
        link.abort([7])
        assert [await core.messages.get(), await core.messages.get()] == [ADD, Abort([7])]
        failed = Failed(1, FailureKind.GENERATION, "x")
        core.writer.write(encode(Beat(0.5, Gauges(num_waiting=3))) + encode(failed))
        await ears.news.wait()
        assert ears.heard == [Gauges(num_waiting=3), failed]
        assert (link.busy_for, link.gauges.num_waiting) == (0.5, 3)


async def test_a_dead_core_is_noticed_and_the_next_one_found(
    parts: tuple[Path, Ears, CoreLink],
) -> None:
    path, ears, link = parts
    for number in (1, 2, 3):
        core = BareCore()
        async with core.serve(path):
            await ready(core, link)
            ears.news.clear()
        await ears.news.wait()
        assert ears.lost == number
        assert link.model is None
        with pytest.raises(Unavailable):
            link.add(ADD)


async def test_nothing_is_accepted_before_the_model_is_ready(
    parts: tuple[Path, Ears, CoreLink],
) -> None:
    path, _, link = parts
    with pytest.raises(Unavailable):
        link.add(ADD)
    core = BareCore()
    async with core.serve(path):
        with pytest.raises(Unavailable):
            link.add(ADD)
        assert core.messages.empty()
