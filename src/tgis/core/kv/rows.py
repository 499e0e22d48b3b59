"""Row layout: each sequence's keys and values lie contiguous in one row of a large tensor.

Rows are as long as the longest sequence allowed, but the operating system commits their pages only
as they are written. So rows are cheap and can be many, and what is counted is the tokens whose
pages are, or soon will be, in memory.

The row of an ended sequence stays as a cached prefix until its memory is wanted. A new sequence
that begins with the same tokens takes the row over, if that does not waste the larger part of it;
else the shared part is copied, at memory speed, and the row stays for others.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tgis.core.kv.prefix import PrefixNames
from tgis.core.sequence import Sequence
from tgis.engines.plan import KvCopy

# Shorter prefixes are not looked up; of a row taken over, a longer match counts to the token.
RUN_TOKENS = 32


@dataclass(slots=True, eq=False)
class _Row:
    slot: int
    size: int = 0  # tokens accounted for
    written: int = 0  # most tokens ever written since its pages were last given back
    is_open: bool = True
    token_ids: list[int] = field(default_factory=list)  # of a cached row: what lies in it
    names: list[bytes] = field(default_factory=list)  # of its prefixes in the index


class RowsMemory:
    """Accounts of the row layout.

    Args:
        num_slots: rows; those beyond the sequences that run at once serve the cache.
        total: tokens that fit in memory, over all rows.
        granule: tokens that the operating system commits at a time.
        caching: keep the rows of ended sequences.
    """

    def __init__(
        self, num_slots: int, total: int, *, granule: int = 1, caching: bool = True
    ) -> None:
        self.total = total // granule * granule
        self.caching = caching
        self._granule = granule
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._rows: dict[int, _Row] = {}  # by slot: open or cached
        self._evictable: OrderedDict[int, _Row] = OrderedDict()  # cached, least recently used first
        self._pinned: dict[int, _Row] = {}  # cached, but about to be copied from
        self._used = self._cached = self._num_pinned = 0  # tokens
        self._names = PrefixNames(RUN_TOKENS)
        self._index: dict[bytes, dict[int, None]] = {}  # name -> slots that hold the prefix
        self._copies: list[KvCopy] = []
        self._released: list[int] = []

    @property
    def used(self) -> int:
        """Tokens held by open sequences."""
        return self._used

    @property
    def cached(self) -> int:
        """Tokens of ended sequences that are kept for reuse."""
        return self._cached

    @property
    def free(self) -> int:
        """Tokens neither used nor cached."""
        return self.total - self._used - self._cached

    def open(self, seq: Sequence, num_tokens: int) -> bool:
        """See `KvMemory.open`."""
        size = self._round_up(num_tokens)
        if size > self.total - self._used:  # common when busy: do not even look
            return False
        found, shared = self._find(seq)
        row = None
        if found is not None:
            row = self._take_over(found, shared, size) or self._copy(found, shared, size)
        if row is None:
            row, shared = self._start(size), 0
        if row is None:
            return False
        seq.slot, seq.room, seq.num_computed = row.slot, row.size, shared
        return True

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """See `KvMemory.reserve`."""
        row = self._rows[seq.slot]
        more = self._round_up(num_tokens) - row.size
        if more > 0:
            if not self._make_room(more):
                return False
            row.size += more
            self._used += more
            seq.room = row.size
        return True

    def commit(self, seq: Sequence) -> None:
        """See `KvMemory.commit`."""
        if not self.caching:
            return
        row = self._rows[seq.slot]
        names = self._names.of(seq, seq.num_computed)
        for name in names[len(row.names) :]:
            self._index.setdefault(name, {})[row.slot] = None
        row.names = names

    def close(self, seq: Sequence, keep: bool = True) -> None:
        """See `KvMemory.close`."""
        if keep:
            self.commit(seq)
        row = self._rows[seq.slot]
        self._used -= row.size
        if keep and row.names:
            row.written = max(row.written, seq.num_written, seq.num_computed)
            row.size = self._round_up(row.written)
            row.token_ids = seq.token_ids[: seq.num_computed]
            row.is_open = False
            self._evictable[row.slot] = row
            self._cached += row.size
        else:
            self._release(row)
        seq.slot, seq.room, seq.num_written, seq.num_computed = -1, 0, 0, 0

    def drain_copies(self) -> list[KvCopy]:
        """See `KvMemory.drain_copies`."""
        copies, self._copies = self._copies, []
        self._evictable |= self._pinned
        self._pinned.clear()
        self._num_pinned = 0
        return copies

    def drain_released(self) -> list[int]:
        """See `KvMemory.drain_released`."""
        released, self._released = self._released, []
        return released

    def check(self) -> str | None:
        """See `KvMemory.check`."""
        return next(self._faults(), None)

    def _faults(self) -> Iterator[str]:
        used = sum(row.size for row in self._rows.values() if row.is_open)
        cached = sum(row.size for row in self._rows.values() if not row.is_open)
        if (used, cached) != (self._used, self._cached) or self.free < 0:
            yield f"used={self._used} cached={self._cached} of {self.total}, held {used}+{cached}"
        if self._evictable.keys() | self._pinned.keys() != {
            slot for slot, row in self._rows.items() if not row.is_open
        }:
            yield f"{len(self._evictable)}+{len(self._pinned)} cached rows are not those listed"
        if sorted([*self._free_slots, *self._rows]) != list(range(self._num_slots)):
            yield f"{len(self._free_slots)} free + {len(self._rows)} rows of {self._num_slots}"
        named = {(name, slot) for slot, row in self._rows.items() for name in row.names}
        if named != {(name, slot) for name, slots in self._index.items() for slot in slots}:
            yield "the index of prefixes does not match the rows"

    def _round_up(self, num_tokens: int) -> int:
        return -(-num_tokens // self._granule) * self._granule

    def _find(self, seq: Sequence) -> tuple[_Row | None, int]:
        """The row that shares the longest prefix with `seq`, and its tokens."""
        if not self.caching or seq.wants_input_details:
            return None, 0
        limit = len(seq.token_ids) - 1
        shared, slots = 0, None
        for name in self._names.of(seq, limit):
            holders = self._index.get(name)
            if holders is None:
                break
            shared, slots = shared + RUN_TOKENS, holders
        if slots is None:
            return None, 0
        row = next(
            (self._rows[slot] for slot in reversed(slots) if slot in self._evictable),
            self._rows[next(reversed(slots))],
        )
        limit = min(limit, len(row.token_ids))
        while shared < limit and row.token_ids[shared] == seq.token_ids[shared]:
            shared += 1
        return row, shared

    def _take_over(self, row: _Row, shared: int, size: int) -> _Row | None:
        """Reopen a cached row; None if it is in use, too long, or does not fit."""
        if row.slot not in self._evictable or 2 * shared < row.size:
            return None
        if max(size, row.size) > self.total - self._used - self._num_pinned:
            return None
        del self._evictable[row.slot]
        self._cached -= row.size
        self._used += row.size
        if size > row.size:
            self._make_room(size - row.size)
            self._used += size - row.size
            row.size = size
        self._unindex(row, shared // RUN_TOKENS)
        row.token_ids = []
        row.is_open = True
        return row

    def _copy(self, source: _Row, shared: int, size: int) -> _Row | None:
        """Open an empty row for a copy of the shared part; None if there is no room for both."""
        if self._evictable.pop(source.slot, None):
            self._pinned[source.slot] = source
            self._num_pinned += source.size
        row = self._start(size)
        if row is not None:
            self._copies.append(KvCopy(source.slot, row.slot, shared))
        elif source.slot in self._pinned and all(c.source != source.slot for c in self._copies):
            self._num_pinned -= self._pinned.pop(source.slot).size
            self._evictable[source.slot] = source
        return row

    def _start(self, size: int) -> _Row | None:
        """Open an empty row."""
        if not self._make_room(size):
            return None
        if not self._free_slots:
            if not self._evictable:
                return None
            self._evict()
        row = _Row(self._free_slots.pop(), size)
        self._rows[row.slot] = row
        self._used += size
        return row

    def _make_room(self, size: int) -> bool:
        """Evict until `size` tokens are free, or change nothing and say no."""
        if size > self.total - self._used - self._num_pinned:
            return False
        while self.free < size:
            self._evict()
        return True

    def _evict(self) -> None:
        """Give up the cached row that has not been used for longest."""
        _, row = self._evictable.popitem(last=False)
        self._cached -= row.size
        self._release(row)

    def _release(self, row: _Row) -> None:
        self._unindex(row, 0)
        del self._rows[row.slot]
        self._free_slots.append(row.slot)
        self._released.append(row.slot)

    def _unindex(self, row: _Row, num_kept: int) -> None:
        for name in row.names[num_kept:]:
            holders = self._index[name]
            del holders[row.slot]
            if not holders:
                del self._index[name]
        del row.names[num_kept:]
