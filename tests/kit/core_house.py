"""The core loop on a real socket, with the fake engine and the real sampler, driven by hand."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.kit.fake_engine import FakeEngine

from tgis.core.adapters import Adapters
from tgis.core.budget import PagedBudget
from tgis.core.kv.blocks import BlocksMemory
from tgis.core.kv.rows import RowsMemory
from tgis.core.link import FrontLink
from tgis.core.loop import Core
from tgis.core.scheduler import Scheduler
from tgis.core.speculation import NO_SPECULATION, Speculation
from tgis.engines.base import CacheShape, Engine
from tgis.sampling.sampler import Sampler
from tgis.types import FinishReason, TokenDetails
from tgis.wire import Decoder, Failed, Found, Gauges, NotFound, Out, ToCore, ToFront, encode

SLOTS = 4


@dataclass
class Pulse:
    step_started: float = 0.0
    gauges: Gauges = field(default_factory=Gauges)


class Front:
    """A blocking client of the core's socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(10)
        self._decoder: Decoder[ToFront] = Decoder(ToFront)
        self.tokens: dict[int, list[int]] = {}
        self.details: dict[int, list[TokenDetails | None]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.failed: dict[int, Failed] = {}
        self.outs: list[Out] = []
        self.answers: dict[int, Found | NotFound] = {}  # by lookup id

    def send(self, message: ToCore) -> None:
        self.sock.sendall(encode(message))

    def read(self) -> None:
        """Take in what is there now."""
        self.sock.setblocking(False)
        try:
            while data := self.sock.recv(1 << 16):
                for message in self._decoder.feed(data):
                    self._note(message)
        except BlockingIOError:
            pass

    def _note(self, message: ToFront) -> None:
        if isinstance(message, Failed):
            assert message.seq_id not in self.failed
            self.failed[message.seq_id] = message
        if isinstance(message, Found | NotFound):
            assert message.lookup_id not in self.answers
            self.answers[message.lookup_id] = message
        if not isinstance(message, Out):
            return
        self.outs.append(message)
        for token in message.tokens:
            assert token.seq_id not in self.finish, "a token after the end"
            if token.token_id >= 0:
                self.tokens.setdefault(token.seq_id, []).append(token.token_id)
                self.details.setdefault(token.seq_id, []).append(token.details)
            if token.finish is not FinishReason.NOT_FINISHED:
                self.finish[token.seq_id] = token.finish


@dataclass
class House:
    path: Path
    link: FrontLink
    core: Core
    engine: FakeEngine
    scheduler: Scheduler
    memory: RowsMemory | BlocksMemory
    now: list[float]
    fronts: list[Front] = field(default_factory=list)

    def connect(self) -> Front:
        self.fronts.append(Front(self.path))
        return self.fronts[-1]

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.core.turn(0.0)
            self.now[0] += 1
        assert self.core.check() is None

    def run(self, *fronts: Front) -> None:
        self.turn()
        while self.scheduler.has_work:
            self.turn()
        for front in fronts:
            front.read()
        assert self.memory.used == 0
        assert not self.core._by_uid
        assert not self.core._sequences
        assert not self.core._sampler._sequences
        assert self.memory.check() is None


@contextmanager
def open_house(
    directory: Path,
    slots: int = SLOTS,
    tokens: int = 200,
    budget: int = 16,
    *,
    engine: Engine | None = None,
    caching: bool = True,
    make_adapters: Callable[[Engine, FrontLink], Adapters] | None = None,
    speculation: Speculation = NO_SPECULATION,
    eos: Sequence[int] = (),
) -> Iterator[House]:
    """A core and no front yet; an engine of one's own must have its cache allocated."""
    path = directory / "core.sock"
    link = FrontLink(path)
    fake = FakeEngine()
    fake.allocate(CacheShape(2 * slots, 64))
    engine = engine or fake
    memory: RowsMemory | BlocksMemory = RowsMemory(2 * slots, tokens, caching=caching)
    if engine.caps.kv_layout == "blocks":
        size = engine.caps.kv_granule
        memory = BlocksMemory(slots, tokens // size, size, caching=caching)
    scheduler = Scheduler(
        memory,
        PagedBudget(tokens, horizon=16),
        max_step_tokens=budget,
        max_running=slots,
        eos_token_ids=eos,
    )
    now = [0.0]
    sampler = Sampler(engine.caps.vocab_size, tuple(eos))
    adapters = make_adapters(engine, link) if make_adapters else None
    clock = lambda: now[0]  # noqa: E731
    core = Core(
        engine,
        sampler,
        scheduler,
        link,
        Pulse(),
        clock=clock,
        adapters=adapters,
        speculation=speculation,
    )
    house = House(path, link, core, fake, scheduler, memory, now)
    try:
        yield house
    finally:
        for front in house.fronts:
            front.sock.close()
        link.close()
        if adapters is not None:
            adapters.close()
