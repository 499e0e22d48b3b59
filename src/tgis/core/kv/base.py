"""The scheduler's view of key/value memory."""

from typing import Protocol

from tgis.core.sequence import Sequence
from tgis.engines.plan import KvCopy


class KvMemory(Protocol):
    """Hands out slots and counts tokens. A sequence holds memory from `open` to `close`."""

    total: int  # tokens that fit

    @property
    def used(self) -> int:
        """Tokens reserved by open sequences."""

    @property
    def cached(self) -> int:
        """Tokens of ended sequences that are kept for reuse."""

    @property
    def free(self) -> int:
        """Tokens neither used nor cached."""

    def open(self, seq: Sequence) -> bool:
        """Give `seq` a slot, set its `slot` and `num_computed`; False if no slot is free."""

    def drain_copies(self) -> list[KvCopy]:
        """Copies that the next step must do first, because of `open` calls since the last one."""

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens of `seq` in all, or change nothing and say no."""

    def close(self, seq: Sequence) -> None:
        """Take the memory of `seq` back."""

    def drain_released(self) -> list[int]:
        """Slots emptied since the last call; their pages may go back to the operating system."""

    def check(self) -> str | None:
        """What is wrong with the accounts, if anything: used + cached + free must be the total."""
