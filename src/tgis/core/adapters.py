"""The adapters that are loaded: who holds them, and which go when memory is wanted.

Files are read and checked by threads of their own, so that no step waits for a disk; all else
happens in the thread of the loop. An adapter is held by lookups of fronts and by sequences, and
stays as long as it is held. What nobody holds is given up for others, that used longest ago first.
Every load gets a handle of its own: a file that was replaced is another adapter, and sequences that
began with the old one end with it.
"""

import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from queue import Empty, SimpleQueue

from tgis.adapters.load import Adapter, Loaded, Rules, load
from tgis.adapters.prompts import SoftPrompt
from tgis.adapters.store import Identity, Refused, Store
from tgis.core.link import FrontLink
from tgis.core.resident import Resident
from tgis.engines.base import Engine
from tgis.types import AdapterKind, Cause, ModelKind
from tgis.wire import Found, Lookup, NotFound

log = logging.getLogger(__name__)

_THREADS = 2
_PATIENCE_SECONDS = 0.002
_MIB = 1 << 20
_NOUNS = {
    AdapterKind.PROMPT: ("prefix", "prefixes", "prompt"),
    AdapterKind.LORA: ("adapter", "adapters", "LoRA"),
}


def _resident(adapter_id: str, handle: int, loaded: Loaded, model: ModelKind) -> Resident:
    decoder, encoder = _num_virtual(loaded.adapter)
    is_seq2seq = model is ModelKind.ENCODER_DECODER
    # The decoder's start token behind its part of a prompt is counted with it, as in TGIS.
    start = bool(decoder) and is_seq2seq
    identity = blake2b(repr((adapter_id, loaded.identity)).encode(), digest_size=16)
    return Resident(
        adapter_id,
        handle,
        loaded.kind,
        loaded.identity,
        loaded.adapter.num_bytes,
        num_decoder=decoder,
        num_encoder=encoder,
        num_input=encoder if is_seq2seq else decoder,
        length=decoder + encoder + start,
        salt=b"adapter" + identity.digest(),
    )


def _num_virtual(adapter: Adapter) -> tuple[int, int]:
    """Virtual tokens for the decoder and for the encoder."""
    if isinstance(adapter, SoftPrompt):
        return adapter.num_decoder, adapter.num_encoder
    return 0, 0


@dataclass(slots=True)
class _Load:
    """A load under way, and who waits for it."""

    waiting: list[tuple[int, int]] = field(default_factory=list)  # (client, lookup id)
    start: float = 0.0


class Adapters:
    """All adapters of one core.

    Args:
        rules: what they must fit.
        limits: bytes for those of each kind.
    """

    def __init__(
        self,
        store: Store,
        rules: Rules,
        limits: Mapping[AdapterKind, int],
        engine: Engine,
        link: FrontLink,
    ) -> None:
        self._store = store
        self._rules = rules
        self._limits = limits
        self._engine = engine
        self._link = link
        self._by_handle: dict[int, Resident] = {}
        self._by_id: OrderedDict[str, Resident] = OrderedDict()  # used longest ago first
        self._loads: dict[str, _Load] = {}
        self._outcomes: SimpleQueue[tuple[str, Loaded | Exception | None]] = SimpleQueue()
        self._just_looking = False  # since the last `settle`, whether a loaded one is the same
        self._held: dict[int, Counter[int]] = {}  # client -> its lookups by handle
        # No other core's handles: a front may still have some of a core that has died.
        self._handles = count(secrets.randbits(30) << 32 | 1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapters")

    def lookup(self, client: int, message: Lookup) -> None:
        """Begin to find out whether an adapter is there, and whether it is still the same."""
        if message.adapter_id not in self._loads:
            self._loads[message.adapter_id] = _Load(start=time.monotonic())
            self._begin(message.adapter_id)
        self._loads[message.adapter_id].waiting.append((client, message.lookup_id))

    def settle(self) -> None:
        """Take in what has been loaded, and answer.

        Looks at files that have just begun are waited for a little: a step would take longer.
        """
        end = time.monotonic() + (_PATIENCE_SECONDS if self._just_looking else 0.0)
        self._just_looking = False
        while self._loads:
            try:
                adapter_id, result = self._outcomes.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                return
            self._settle(adapter_id, result)

    def get(self, handle: int) -> Resident | None:
        """The adapter of a handle, if it is still loaded."""
        return self._by_handle.get(handle)

    def hold(self, resident: Resident) -> None:
        """Keep an adapter until `let_go`."""
        resident.holders += 1

    def let_go(self, resident: Resident) -> None:
        """One holder less."""
        resident.holders -= 1
        if not resident.holders and self._by_id.get(resident.adapter_id) is not resident:
            self._detach(resident)

    def unpin(self, client: int, handle: int) -> None:
        """A front does not need one of its lookups any more."""
        held = self._held.get(client, Counter())
        if held[handle] > 0:
            held[handle] -= 1
            self.let_go(self._by_handle[handle])
        if held[handle] == 0:
            del held[handle]

    def gone(self, client: int) -> None:
        """A front's connection has ended."""
        for handle, number in self._held.pop(client, Counter()).items():
            for _ in range(number):
                self.let_go(self._by_handle[handle])

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self) -> str | None:
        """What is wrong with the accounts while no sequence is there, if anything."""
        held: Counter[int] = sum(self._held.values(), Counter())
        for resident in self._by_handle.values():
            if resident.holders != held[resident.handle]:
                return f"adapter {resident.handle}: {resident.holders} holders, {held} lookups"
        return None

    def _begin(self, adapter_id: str) -> None:
        resident = self._by_id.get(adapter_id)
        known = None if resident is None else resident.identity
        self._just_looking |= known is not None
        self._threads.submit(self._load, adapter_id, known)

    def _load(self, adapter_id: str, known: Identity | None) -> None:
        """In a thread of its own."""
        result: Loaded | Exception | None
        try:
            result = load(self._store, adapter_id, self._rules, known)
        except Exception as error:
            result = error
        self._outcomes.put((adapter_id, result))
        self._link.wake()

    def _settle(self, adapter_id: str, result: Loaded | Exception | None) -> None:
        resident = self._by_id.get(adapter_id)
        if result is None and resident is None:  # given up for another meanwhile
            self._begin(adapter_id)
            return
        waiting = self._loads.pop(adapter_id)
        seconds = 0.0
        if not isinstance(result, Loaded | None):
            self._forget(adapter_id)
            self._refuse(waiting, result)
            return
        if result is not None:
            seconds = time.monotonic() - waiting.start
            try:
                resident = self._admit(adapter_id, result)
            except Exception as error:
                self._refuse(waiting, error)
                return
        assert resident is not None
        self._by_id.move_to_end(adapter_id)
        for client, lookup_id in waiting.waiting:
            if not self._link.is_connected(client):
                continue
            self.hold(resident)
            self._held.setdefault(client, Counter())[resident.handle] += 1
            found = Found(
                lookup_id,
                resident.handle,
                resident.kind,
                resident.num_input,
                resident.length,
                seconds,
            )
            self._link.send(client, found)
            seconds = 0.0  # it was loaded once

    def _refuse(self, load_: _Load, error: Exception) -> None:
        if isinstance(error, MemoryError):
            error = Refused("there is no memory for it", Cause.BUSY)
        elif not isinstance(error, Refused):
            log.error("an adapter could not be loaded", exc_info=error)
            error = Refused(type(error).__name__)
        for client, lookup_id in load_.waiting:
            self._link.send(client, NotFound(lookup_id, error.cause, str(error), error.kind))

    def _admit(self, adapter_id: str, loaded: Loaded) -> Resident:
        """Hand a loaded adapter to the engine.

        Raises:
            Refused: there is no room for it.
        """
        self._forget(adapter_id)
        resident = _resident(adapter_id, next(self._handles), loaded, self._engine.caps.kind)
        self._make_room(resident)
        self._engine.attach(resident.handle, loaded.adapter)
        self._by_handle[resident.handle] = self._by_id[adapter_id] = resident
        noun, _, cache = _NOUNS[resident.kind]
        log.info(
            "Added %s %s to the %s cache, has %d virtual tokens, size %.3fMiB,"
            " total cache size is now %.2fMiB",
            noun,
            adapter_id,
            cache,
            resident.num_decoder + resident.num_encoder,
            resident.num_bytes / _MIB,
            self._used(resident.kind) / _MIB,
        )
        return resident

    def _make_room(self, newcomer: Resident) -> None:
        limit, kind = self._limits[newcomer.kind], newcomer.kind
        _, plural, cache = _NOUNS[kind]
        if newcomer.num_bytes > limit:
            name = "Prefix ID object" if kind is AdapterKind.PROMPT else "Adapter"
            message = f"{name} {newcomer.adapter_id} exceeds the allowed cache size"
            raise Refused(message, kind=kind)
        idle = [r for r in self._by_id.values() if r.kind is kind and not r.holders]
        room = limit - self._used(kind)
        if room + sum(r.num_bytes for r in idle) < newcomer.num_bytes:
            raise Refused("the cache is full of adapters in use", Cause.BUSY, kind)
        deleted = []
        for resident in idle:
            if room >= newcomer.num_bytes:
                break
            self._forget(resident.adapter_id)
            room += resident.num_bytes
            deleted.append(resident.adapter_id)
        if deleted:
            log.info("Deleted %s %s from the %s cache", plural, deleted, cache)

    def _used(self, kind: AdapterKind) -> int:
        return sum(r.num_bytes for r in self._by_handle.values() if r.kind is kind)

    def _forget(self, adapter_id: str) -> None:
        """New requests do not get this one; it stays for those that hold it."""
        resident = self._by_id.pop(adapter_id, None)
        if resident is not None and not resident.holders:
            self._detach(resident)

    def _detach(self, resident: Resident) -> None:
        del self._by_handle[resident.handle]
        self._engine.detach(resident.handle)
