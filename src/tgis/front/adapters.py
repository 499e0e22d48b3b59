"""Which adapter a request names, and the core's word that it is loaded: `prefix_id`, `adapter_id`.

Both name a directory of one store; only the texts of errors differ, as those of the servers differ
from which they come. Files are the core's business. What the core has loaded stays loaded for as
long as the request lasts.
"""

import asyncio
import re
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from tgis.errors import InvalidRequest, Overloaded, RequestError, Unavailable
from tgis.front.link import CoreLink
from tgis.observe.metrics import Metrics
from tgis.proto import generation_pb2 as pb
from tgis.types import AdapterKind, Cause
from tgis.wire import Found, Lookup, NotFound

Request = pb.BatchedGenerationRequest | pb.SingleGenerationRequest | pb.BatchedTokenizeRequest

_ID = re.compile(r"[/\w\-]+")
_MAX_ID = 1024  # characters; file systems allow little more
_SHOWN = 200  # characters of an id in a message
_MAX_LOOKUPS = 256  # different adapters that are looked up at the same time
_LOOKUP_SECONDS = 30.0
_METRICS = {AdapterKind.PROMPT: "tgi_prompt_load", AdapterKind.LORA: "tgi_lora_load"}


class _Texts(NamedTuple):
    """How one of the two fields puts its errors; `{id}` and `{message}` are filled in."""

    disabled: str
    invalid: str
    absolute: str
    causes: dict[Cause, str]


_PREFIX = "can't retrieve prompt prefix with id '{id}': "
_ADAPTER = "can't retrieve adapter with id '{id}': "
_CHARACTERS = "must contain only alphanumeric, _ and - and /"
_UNSUPPORTED = "adapter type {message} is not currently supported"
PREFIX_TEXTS = _Texts(
    disabled=_PREFIX + "prompt prefixes are not enabled on this server",
    invalid=_PREFIX + "Invalid prefix id {id}, " + _CHARACTERS,
    absolute=_PREFIX + "Invalid prefix id {id}",
    causes={
        Cause.MISSING: _PREFIX + 'prefix id "{id}" not found',
        Cause.NO_CONFIG: _PREFIX + 'prefix id "{id}" not found',
        Cause.UNSUPPORTED: _PREFIX + _UNSUPPORTED,
        Cause.INVALID: _PREFIX + "{message}",
        Cause.BUSY: _PREFIX + "{message}",
    },
)
ADAPTER_TEXTS = _Texts(
    disabled="adapter_id supplied but no adapter store was configured",
    invalid="Invalid adapter id '{id}', " + _CHARACTERS,
    absolute="Invalid adapter id '{id}', " + _CHARACTERS,
    causes={
        Cause.MISSING: _ADAPTER + "directory does not exist",
        Cause.NO_CONFIG: _ADAPTER + "invalid adapter: no adapter_config.json found",
        Cause.UNSUPPORTED: _UNSUPPORTED,
        Cause.INVALID: _ADAPTER + "{message}",
        Cause.BUSY: _ADAPTER + "{message}",
    },
)


@dataclass(slots=True, eq=False)
class _Pin:
    """One `Found` of the core, shared by all requests that waited for it together."""

    answer: "asyncio.Future[Found | NotFound | None]"  # None = the core is gone
    num_users: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """An adapter that stays loaded until the end of a `with` block.

    Attributes:
        handle: 0 = the request names none.
        num_virtual: tokens before the input, as lists of input tokens show them.
        length: tokens that it takes of the sequence length.
    """

    handle: int = 0
    num_virtual: int = 0
    length: int = 0
    _pin: _Pin | None = None
    _adapters: "Adapters | None" = field(default=None, repr=False)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pin is not None and self._adapters is not None:
            self._adapters.leave(self._pin)
            self._pin = None


class Adapters:
    """The adapters of requests.

    Args:
        enabled: there is a store.
    """

    def __init__(self, link: CoreLink, metrics: Metrics, *, enabled: bool) -> None:
        self._link = link
        self._metrics = metrics
        self._enabled = enabled
        self._ids = count(1)
        self._waiting: dict[str, _Pin] = {}  # by adapter id, while it is looked up
        self._lookups: dict[int, str] = {}  # lookup id -> adapter id
        link.lookups = self

    async def lease(self, request: Request) -> Lease:
        """The adapter that a request names: `adapter_id`, else `prefix_id`.

        Raises:
            InvalidRequest: it cannot be had.
            Overloaded: there is no room for it now.
            Unavailable: there is no core that can serve.
        """
        if request.adapter_id:
            return await self._lease(request.adapter_id, ADAPTER_TEXTS, AdapterKind.LORA)
        if request.prefix_id:
            return await self._lease(request.prefix_id, PREFIX_TEXTS, AdapterKind.PROMPT)
        return Lease()

    def leave(self, pin: _Pin) -> None:
        """One user less; the last one gives the pin back to the core."""
        pin.num_users -= 1
        if not pin.num_users and pin.answer.done():
            self._give_back(pin.answer.result())

    def on_answer(self, answer: Found | NotFound) -> None:
        """The core has looked something up."""
        pin = self._waiting.pop(self._lookups.pop(answer.lookup_id))
        pin.answer.set_result(answer)
        if isinstance(answer, Found):
            if answer.seconds:
                self._metrics.observe(f"{_METRICS[answer.kind]}_duration", answer.seconds)
            if not pin.num_users:
                self._give_back(answer)

    def on_lost(self) -> None:
        """The core is gone, and with it what it had loaded."""
        waiting, self._waiting = self._waiting, {}
        self._lookups.clear()
        for pin in waiting.values():
            pin.answer.set_result(None)

    async def _lease(self, adapter_id: str, texts: _Texts, kind: AdapterKind) -> Lease:
        text = self._refuse(adapter_id, texts)
        if text is not None:
            raise self._failed(text, adapter_id, kind)
        pin = self._look_up("/".join(part for part in adapter_id.split("/") if part))
        pin.num_users += 1
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                answer = await asyncio.shield(pin.answer)
            if answer is None:
                raise Unavailable("The inference engine has died and is being restarted")
            if isinstance(answer, NotFound):
                text = texts.causes[answer.cause]
                busy = answer.cause is Cause.BUSY
                kind = kind if answer.kind is None else answer.kind
                raise self._failed(text, adapter_id, kind, answer.message, busy=busy)
        except TimeoutError:
            self.leave(pin)
            raise Unavailable("The adapter is still being loaded; try again") from None
        except BaseException:
            self.leave(pin)
            raise
        return Lease(answer.handle, answer.num_virtual, answer.length, pin, self)

    def _refuse(self, adapter_id: str, texts: _Texts) -> str | None:
        """Why an id is not even looked up, if so."""
        if not self._enabled:
            return texts.disabled
        if not _ID.fullmatch(adapter_id):
            return texts.invalid
        if adapter_id.startswith("/"):
            return texts.absolute
        return texts.causes[Cause.MISSING] if len(adapter_id) > _MAX_ID else None

    def _failed(
        self,
        text: str,
        adapter_id: str,
        kind: AdapterKind,
        message: str = "",
        *,
        busy: bool = False,
    ) -> RequestError:
        self._metrics.count(f"{_METRICS[kind]}_failure")
        error = Overloaded if busy else InvalidRequest
        return error(text.format(id=_shown(adapter_id), message=message))

    def _look_up(self, adapter_id: str) -> _Pin:
        """The lookup of this id that is under way, else a new one."""
        pin = self._waiting.get(adapter_id)
        if pin is None:
            if len(self._waiting) >= _MAX_LOOKUPS:
                raise Overloaded("Model is overloaded")
            lookup_id = next(self._ids)
            self._link.lookup(Lookup(lookup_id, adapter_id))
            pin = _Pin(asyncio.get_running_loop().create_future())
            self._waiting[adapter_id], self._lookups[lookup_id] = pin, adapter_id
        return pin

    def _give_back(self, answer: Found | NotFound | None) -> None:
        if isinstance(answer, Found):
            self._link.unpin(answer.handle)


def _shown(adapter_id: str) -> str:
    """An id for a message: cut, and nothing that does not print."""
    cut = adapter_id if len(adapter_id) <= _SHOWN else adapter_id[:_SHOWN] + "..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]
