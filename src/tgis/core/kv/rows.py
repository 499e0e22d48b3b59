"""Row layout: each sequence's keys and values lie contiguous in one row of a large tensor.

Rows are as long as the longest sequence allowed, but the operating system commits their pages only
as they are written. So slots are cheap, and what is counted is tokens really reserved.
"""

from tgis.core.sequence import Sequence
from tgis.engines.plan import KvCopy


class RowsMemory:
    """Accounts of the row layout.

    Args:
        num_slots: rows.
        total: tokens that fit in memory, over all rows.
    """

    def __init__(self, num_slots: int, total: int) -> None:
        self.total = total
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        self._reserved: dict[int, int] = {}  # slot -> tokens
        self._used = 0
        self._released: list[int] = []

    @property
    def used(self) -> int:
        """Tokens reserved by open sequences."""
        return self._used

    @property
    def cached(self) -> int:
        """This memory keeps nothing of ended sequences."""
        return 0

    @property
    def free(self) -> int:
        """Tokens that can still be reserved."""
        return self.total - self._used

    def open(self, seq: Sequence) -> bool:
        """Give `seq` an empty row, or return False if there is none."""
        if not self._free_slots:
            return False
        seq.slot = self._free_slots.pop()
        seq.num_computed = 0
        self._reserved[seq.slot] = 0
        return True

    def drain_copies(self) -> list[KvCopy]:
        """No copies: every row starts empty."""
        return []

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens of `seq` in all, or say no."""
        more = num_tokens - self._reserved[seq.slot]
        if more <= 0:
            return True
        if more > self.free:
            return False
        self._reserved[seq.slot] = num_tokens
        self._used += more
        return True

    def close(self, seq: Sequence) -> None:
        """Take the row of `seq` back."""
        self._used -= self._reserved.pop(seq.slot)
        self._free_slots.append(seq.slot)
        self._released.append(seq.slot)
        seq.slot = -1
        seq.num_computed = 0

    def drain_released(self) -> list[int]:
        """Rows emptied since the last call and not given out again."""
        slots = [slot for slot in self._released if slot not in self._reserved]
        self._released = []
        return slots

    def check(self) -> str | None:
        """What is wrong with the accounts, if anything."""
        if self._used != sum(self._reserved.values()) or not 0 <= self._used <= self.total:
            return f"used={self._used} but reserved={sum(self._reserved.values())} of {self.total}"
        if len(self._free_slots) + len(self._reserved) != self._num_slots:
            return f"{len(self._free_slots)} free + {len(self._reserved)} open of {self._num_slots}"
        return None
