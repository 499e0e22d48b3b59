"""Where a stop sequence ends a text, and how much of the text must wait until that is known.

Source of the rules: TGIS api, section 9. A match ends within the text of the newest token; the
first sequence in request order wins, and of it the last occurrence. TGIS compares UTF-8 bytes;
characters give the same, as a sequence of whole characters can only begin and end between
characters.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Fed(NamedTuple):
    """What became of the text of one token."""

    release: str
    matched: str | None = None  # the stop sequence, as requested; nothing follows it


class StopMatcher:
    """Looks for stop sequences in the growing text of one sequence.

    Args:
        stops: not empty strings, in the order in which they are tried.
        include: whether the text ends after the stop sequence, else before it.
    """

    __slots__ = ("_held", "_include", "_keep", "_recent", "_stops")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._keep = max(map(len, self._stops), default=1) - 1  # characters that still matter
        self._recent = ""  # the end of the text so far, at most `_keep` characters
        self._held = 0  # how many of them, at the end, have not been released

    def feed(self, text: str, enabled: bool = True) -> Fed:
        """Take the text that a token added; return what can be shown.

        While not `enabled` nothing matches, nor does later what is completed now.
        """
        if not self._stops or not text:
            return Fed(text)
        num_old = len(self._recent)
        window = self._recent + text
        begin = num_old - self._held
        if enabled:
            for stop in self._stops:
                start = window.rfind(stop, max(0, num_old + 1 - len(stop)))
                if start >= 0:
                    self._recent, self._held = "", 0
                    end = start + len(stop) if self._include else start
                    return Fed(window[begin:end], stop)
        self._held = 0 if self._include else self._num_undecided(window)
        self._recent = window[max(0, len(window) - self._keep) :]
        return Fed(window[begin : len(window) - self._held])

    def flush(self) -> str:
        """Return what was held, as no text follows."""
        held, self._held = self._held, 0
        return self._recent[len(self._recent) - held :]

    def _num_undecided(self, text: str) -> int:
        """Return how many characters at the end may yet become a stop sequence."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    start = text.find(stop[0], max(0, len(text) + 1 - len(stop)))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
