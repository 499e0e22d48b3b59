"""Drafts: guesses of the tokens that follow, from the sequence itself (prompt lookup).

What a text has said before it often says again: names, quotations, code, the input that a summary
or a correction repeats. The tokens behind the longest earlier occurrence of a sequence's last few
tokens are its draft. Occurrences are found as LZ77 compressors find theirs: a table of the last
place of every run of `RUN` tokens, and for every place the one before it with an equal run. Where
a copy differs in a token, it is followed for a little while as if it went on behind that token.
"""

from array import array
from collections.abc import Sequence as Ids
from typing import Protocol

from tgis.core.sequence import Sequence

RUN = 3  # equal tokens that make an occurrence
_MOST_PLACES = 16  # occurrences that are compared, the latest ones
_LONGEST = 32  # equal tokens beyond which occurrences do not differ


class Drafter(Protocol):
    """Where drafts come from."""

    def draft(self, wanted: Ids[tuple[Sequence, int]]) -> list[list[int]]:
        """For each sequence at most so many tokens that may follow; none where it has no idea."""

    def seconds(self, num_tokens: int) -> float:
        """What it takes to make a draft of so many tokens, as far as it matters."""

    def forget(self, uid: int) -> None:
        """This sequence has ended; it may be unknown."""


class Occurrences:
    """Where runs of tokens have occurred in one growing sequence."""

    __slots__ = ("_before", "_distance", "_last", "_num", "_trusted")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # run -> where it ended last
        self._before = array("i")  # for each end: where the same run had ended before, or -1
        self._num = 0
        self._distance = 0  # from the copy that was found last to the end, ...
        self._trusted = 0  # ... and the length up to which it is followed

    def extend(self, ids: Ids[int], skip: int = 0) -> None:
        """Take in the tokens that `ids` has more than last time.

        Args:
            skip: the first ones, which are no tokens.
        """
        last, before = self._last, self._before
        if not self._num:
            before.extend([-1] * (skip + RUN))
            self._num = skip + RUN - 1
        for end in range(self._num + 1, len(ids) + 1):
            run = tuple(ids[end - RUN : end])
            place = last.get(run, -1)
            if end < len(before):
                before[end] = place
            else:
                before.append(place)
            last[run] = end
        self._num = max(self._num, len(ids))

    def find(self, ids: Ids[int]) -> int:
        """Where what follows the last tokens has perhaps stood before, -1 if nowhere.

        Behind the longest equal run, of equally long ones the latest.
        """
        end = len(ids)
        best, longest = -1, 0
        place = self._before[end] if end < len(self._before) else -1
        for _ in range(_MOST_PLACES):
            if place < 0:
                break
            length = RUN
            while length < min(_LONGEST, place) and ids[place - 1 - length] == ids[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before[place]
        if best >= 0:
            self._distance, self._trusted = end - best, end + _LONGEST
        elif self._distance and end <= self._trusted:
            best = end - self._distance
        return best


class PromptLookup:
    """Drafts by what the sequence has said before."""

    def __init__(self) -> None:
        self._occurrences: dict[int, Occurrences] = {}  # by uid

    def draft(self, wanted: Ids[tuple[Sequence, int]]) -> list[list[int]]:
        """See `Drafter.draft`."""
        return [self._draft(seq, num_tokens) for seq, num_tokens in wanted]

    def seconds(self, num_tokens: int) -> float:
        """Nothing that could be seen beside a step."""
        return 0.0

    def forget(self, uid: int) -> None:
        """See `Drafter.forget`."""
        self._occurrences.pop(uid, None)

    def _draft(self, seq: Sequence, num_tokens: int) -> list[int]:
        occurrences = self._occurrences.get(seq.uid)
        if occurrences is None:
            occurrences = self._occurrences[seq.uid] = Occurrences()
        ids = seq.token_ids
        occurrences.extend(ids, seq.num_virtual)
        place = occurrences.find(ids)
        if place < 0:
            return []
        draft = ids[place : place + num_tokens]
        period = len(ids) - place  # beyond the end it goes on repeating itself
        while len(draft) < num_tokens:
            draft.append(draft[len(draft) - period])
        return draft
