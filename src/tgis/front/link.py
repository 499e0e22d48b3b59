"""The front's end of the Unix socket to the core.

The core may die and come back; the front stays. End of file means death: whoever listens is told
at once, and the link keeps trying to connect to the next core.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tgis.errors import Unavailable
from tgis.types import ModelInfo
from tgis.wire import (
    Abort,
    Add,
    Beat,
    Decoder,
    Failed,
    Found,
    Gauges,
    Hold,
    Loading,
    Lookup,
    NotFound,
    Out,
    Ready,
    ToCore,
    ToFront,
    Unpin,
    encode,
)

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.05


class CoreListener(Protocol):
    """Who is told what the core says."""

    def on_out(self, out: Out) -> None:
        """A step has ended."""

    def on_gauges(self, gauges: Gauges) -> None:
        """The state of queue and batch, also while nothing is computed."""

    def on_failed(self, failed: Failed) -> None:
        """A sequence has failed."""

    def on_lost(self) -> None:
        """The core is gone, and every open sequence with it."""


class LookupListener(Protocol):
    """Who is told of adapters."""

    def on_answer(self, answer: Found | NotFound) -> None:
        """The core has looked an adapter up."""

    def on_lost(self) -> None:
        """The core is gone, and what it had loaded."""


class _Wire(asyncio.Protocol):
    def __init__(self, on_message: Callable[[ToFront], None]) -> None:
        self._decoder: Decoder[ToFront] = Decoder(ToFront)
        self._on_message = on_message
        self.closed = asyncio.get_running_loop().create_future()
        self.has_spoken = False

    def data_received(self, data: bytes) -> None:
        self.has_spoken = True
        for message in self._decoder.feed(data):
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(exc)


class CoreLink:
    """The connection to the core, kept up by `run`.

    `model` is None while there is no core that can serve.
    """

    def __init__(self, path: Path, listener: CoreListener) -> None:
        self._path = path
        self._listener = listener
        self.lookups: LookupListener | None = None
        self._transport: asyncio.Transport | None = None
        self.model: ModelInfo | None = None
        self.loading = Loading(0, 0)
        self.gauges = Gauges()
        self.busy_for = 0.0  # age of the core's step under way at the last beat
        self.last_heard = 0.0  # CLOCK_MONOTONIC
        self.changed = asyncio.Event()  # set whenever `model` changes

    @property
    def connected(self) -> bool:
        """Whether a core's process is there."""
        return self._transport is not None

    async def run(self) -> None:
        """Connect, listen until the core is gone, and start over; ends only when cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                transport, wire = await loop.create_unix_connection(
                    lambda: _Wire(self._on_message), str(self._path)
                )
            except OSError:  # no core listens yet
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._transport = transport
            try:
                await wire.closed
            finally:
                self._transport = None
                transport.close()
                self._set_model(None)
                # A dying core's socket may still take a connection, which then ends unheard.
                if wire.has_spoken:
                    self._listener.on_lost()
                    if self.lookups is not None:
                        self.lookups.on_lost()

    def add(self, request: Add) -> None:
        """Hand a sequence to the core.

        Raises:
            Unavailable: there is no core that can serve.
        """
        self._ask(request)

    def lookup(self, request: Lookup) -> None:
        """Ask the core for an adapter; the answer comes to `lookups`.

        Raises:
            Unavailable: there is no core that can serve.
        """
        self._ask(request)

    def unpin(self, handle: int) -> None:
        """Tell the core that an adapter that it found is not needed any more."""
        if self._transport is not None:
            self._transport.write(encode(Unpin(handle)))

    def abort(self, seq_ids: Sequence[int]) -> None:
        """Ask the core to forget sequences."""
        if self._transport is not None:
            self._transport.write(encode(Abort(list(seq_ids))))

    def hold(self, seq_id: int, held: bool) -> None:
        """Ask the core to compute nothing more of a sequence for now, or to go on."""
        if self._transport is not None:
            self._transport.write(encode(Hold(seq_id, held)))

    def _ask(self, message: ToCore) -> None:
        if self._transport is None or self.model is None:
            raise Unavailable("The model is not ready to serve requests")
        self._transport.write(encode(message))

    def _on_message(self, message: ToFront) -> None:
        self.last_heard = time.monotonic()
        match message:
            case Out():
                self.gauges = message.gauges
                self._listener.on_out(message)
            case Failed():
                self._listener.on_failed(message)
            case Found() | NotFound():
                if self.lookups is not None:
                    self.lookups.on_answer(message)
            case Beat():
                self.gauges, self.busy_for = message.gauges, message.busy_for
                self._listener.on_gauges(message.gauges)
            case Loading():
                self.loading = message
            case Ready():
                self._set_model(message.model)

    def _set_model(self, model: ModelInfo | None) -> None:
        self.model = model
        self.changed.set()
        self.changed = asyncio.Event()
