"""The text of one sequence as it grows: a stream for every way in which decoders join tokens.

A stream looks each id up in a table that the sequences of one tokenizer share. What an entry holds
depends on the stream; None stands for a token without a part in the text.
"""

from codecs import utf_8_decode
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

BROKEN = "\ufffd"


class Table(dict[int, Any]):
    """What a stream must know of each token id, worked out when the id is first seen."""

    def __init__(self, token: Callable[[int], str | None], entry: Callable[[str], Any]) -> None:
        self._token = token
        self._entry = entry

    def __missing__(self, token_id: int) -> Any:
        token = self._token(token_id)
        value = None if token is None else self._entry(token)
        self[token_id] = value
        return value


class TextStream:
    """One sequence's text, token by token; made by `Detokenizer.stream`.

    U+FFFD at the end is held until other text follows, and dropped when none does.
    """

    __slots__ = ("_num_broken", "_table")

    def __init__(self, table: Table) -> None:
        self._table = table
        self._num_broken = 0  # U+FFFD held

    def add(self, token_id: int) -> str:
        """Return the text that this token releases, "" while a character is incomplete."""
        entry = self._table[token_id]
        if entry is None:
            return ""
        text = self._next(entry)
        if not text or (text[-1] != BROKEN and not self._num_broken):
            return text
        return self._hold_broken(text)

    def finish(self) -> str:
        """Return what is left when no token follows."""
        return self._hold_broken(self._end())

    def _next(self, entry: Any) -> str:
        raise NotImplementedError

    def _end(self) -> str:
        return ""

    def _hold_broken(self, text: str) -> str:
        whole = text.rstrip(BROKEN)
        num_broken = len(text) - len(whole)
        if not whole:
            self._num_broken += num_broken
            return ""
        whole = BROKEN * self._num_broken + whole
        self._num_broken = num_broken
        return whole


class Utf8Stream(TextStream):
    """Every token is some bytes, and only their sum is UTF-8.

    Entries: text where the bytes of the token are complete characters, else the bytes.
    """

    __slots__ = ("_pending",)

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._pending = b""  # an incomplete character

    def _next(self, entry: str | bytes) -> str:
        if isinstance(entry, str):
            if not self._pending:
                return entry
            entry = entry.encode()
        data = self._pending + entry
        text, num_used = utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return text


class Opening(NamedTuple):
    """How a text differs at its very beginning."""

    table: Table | None = None  # entries for the first token
    strip: str = ""  # the character stripped from the left
    num_strip: int = 0  # at most so many times


class PieceStream(TextStream):
    """Every token has its own text, but for byte tokens, which spell characters together.

    Entries: the text of a token, or one byte. In a run of byte tokens everything from the first
    invalid byte on is broken.
    """

    __slots__ = ("_body", "_broken_run", "_num_strip", "_run", "_strip")

    def __init__(self, table: Table, opening: Opening) -> None:
        super().__init__(table if opening.table is None else opening.table)
        self._body = table
        self._strip, self._num_strip = opening.strip, opening.num_strip
        self._run = b""  # an incomplete character
        self._broken_run = False

    def _next(self, entry: str | bytes) -> str:
        self._table = self._body
        text = self._next_byte(entry) if isinstance(entry, bytes) else self._next_text(entry)
        return self._stripped(text) if self._num_strip and text else text

    def _next_text(self, text: str) -> str:
        if self._run:
            text = BROKEN * len(self._run) + text
            self._run = b""
        self._broken_run = False
        return text

    def _next_byte(self, byte: bytes) -> str:
        if self._broken_run:
            return BROKEN
        self._run += byte
        try:
            text, num_used = utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            self._broken_run = True
            text, num_used = BROKEN * len(self._run), len(self._run)
        self._run = self._run[num_used:]
        return text

    def _stripped(self, text: str) -> str:
        while self._num_strip and text:
            if text[0] == self._strip:
                text = text[1:]
                self._num_strip -= 1
            else:
                self._num_strip = 0
        return text


class Suffixed(NamedTuple):
    """The text of a token whose end depends on whether it is the last."""

    text: str
    if_followed: str
    if_last: str


class SuffixStream(TextStream):
    """The end of a token's text waits for the next token. Entries: `Suffixed`."""

    __slots__ = ("_previous",)

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._previous = Suffixed("", "", "")

    def _next(self, entry: Suffixed) -> str:
        end = self._previous.if_followed
        self._previous = entry
        return end + entry.text

    def _end(self) -> str:
        return self._previous.if_last


class DedupStream(TextStream):
    """A token that repeats the one before adds nothing. Entries: (token, its text)."""

    __slots__ = ("_previous",)

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._previous: str | None = None

    def _next(self, entry: tuple[str, str]) -> str:
        token, text = entry
        if token == self._previous:
            return ""
        self._previous = token
        return text


class WindowStream(TextStream):
    """Tokens are decoded together with those released last. Entries: tokens.

    Exact as long as no decoder looks further back than one piece of text. `context` is a token
    that stands for all text before the window.
    """

    __slots__ = ("_context", "_decode", "_fresh", "_released")

    def __init__(
        self, table: Table, decode: Callable[[list[str]], str], context: str, begins: bool
    ) -> None:
        super().__init__(table)
        self._decode = decode
        self._context = context
        self._released = [] if begins else [context]
        self._fresh: list[str] = []

    def _next(self, entry: str) -> str:
        self._fresh.append(entry)
        text = self._end()
        if not text or text.endswith(BROKEN):
            return ""
        self._released, self._fresh = [self._context, *self._fresh], []
        return text

    def _end(self) -> str:
        known = self._decode(self._released)
        return self._decode(self._released + self._fresh)[len(known) :]


class LastEosStream(TextStream):
    """Shows special tokens, EOS too, unless it is the very last token. Wraps another stream."""

    __slots__ = ("_eos_token_ids", "_held", "_inner")

    def __init__(self, inner: TextStream, eos_token_ids: Collection[int]) -> None:
        self._inner = inner
        self._eos_token_ids = eos_token_ids
        self._held: int | None = None

    def add(self, token_id: int) -> str:
        """Return the text that this token and an EOS before it release."""
        text = "" if self._held is None else self._inner.add(self._held)
        self._held = token_id if token_id in self._eos_token_ids else None
        return text if self._held is not None else text + self._inner.add(token_id)

    def finish(self) -> str:
        """Return what is left when no token follows."""
        return self._inner.finish()
