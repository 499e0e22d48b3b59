"""The scheduler's view of key/value memory."""

from typing import Protocol

from tgis.core.sequence import Sequence
from tgis.engines.plan import KvCopy


class KvMemory(Protocol):
    """Counts tokens and says where they live. A sequence holds memory from `open` to `close`.

    Every token of the pool is used (by an open sequence), cached (left by an ended one, and given
    up for whoever needs room) or free.
    """

    total: int  # tokens that fit
    caching: bool  # whether ended sequences leave prefixes behind

    @property
    def used(self) -> int:
        """Tokens held by open sequences."""

    @property
    def cached(self) -> int:
        """Tokens of ended sequences that are kept for reuse."""

    @property
    def free(self) -> int:
        """Tokens neither used nor cached."""

    def open(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` room for `num_tokens` tokens, or say no.

        Sets `slot`, `room` and `num_computed`: tokens of a prefix that is cached already. The last
        token is never among them, so that there is something to compute; nor is any token of a
        sequence that wants to know about its input.
        """

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens of `seq` in all, or change nothing and say no."""

    def commit(self, seq: Sequence) -> None:
        """The first `num_computed` tokens are there now: others may share them."""

    def close(self, seq: Sequence, keep: bool = True) -> None:
        """Take the memory of `seq` back.

        Args:
            keep: what was computed is sound, and may be kept as a cached prefix.
        """

    def drain_copies(self) -> list[KvCopy]:
        """Copies that the next step must do first, because of `open` calls since the last one."""

    def drain_released(self) -> list[int]:
        """Slots given up since the last call: their pages may go back to the operating system.

        Slots that have been given out again are among them, so this is for before the step.
        """

    def check(self) -> str | None:
        """What is wrong with the accounts, if anything."""
