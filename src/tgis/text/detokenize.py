"""Token ids to text, at once or one token at a time.

A fast tokenizer turns ids into token strings, drops the special ones, and hands the rest to its
decoder, which sees the whole sequence. Here the same text is released as it grows:

    decoder                     what a token's text depends on           stream
    ByteLevel                   bytes that complete a character          `Utf8Stream`
    Metaspace, WordPiece, none  being the first token                    `PieceStream`
    Sequence of LLaMA's kind    ... and the run of byte tokens it is in  `PieceStream`
    ByteFallback, Fuse, Strip, Replace alone                             `PieceStream`
    BPE (suffix `</w>`)         being the last token                     `SuffixStream`
    CTC                         the token before                         `DedupStream`
    any other combination       the tokens around it                     `WindowStream`

Rules from the TGIS api: the output of a causal model continues a text, so a leading space stays;
that of an encoder-decoder model begins one. U+FFFD at the end is an incomplete character and goes.

One rule differs from the `tokenizers` library on purpose: there, one incomplete character at the
end of a run of byte tokens breaks the whole run. Here the characters before it stay, as a stream
has shown them by then.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import tokenizers

from tgis.text.streams import (
    BROKEN,
    DedupStream,
    LastEosStream,
    Opening,
    PieceStream,
    Suffixed,
    SuffixStream,
    Table,
    TextStream,
    Utf8Stream,
    WindowStream,
)
from tgis.types import ModelKind

_CONTEXT = "A"  # stands for the text before, or the token after
_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")
_PER_TOKEN = {"Replace", "Strip", "Metaspace", "WordPiece", "ByteFallback"}

Decode = Callable[[list[str]], str]
MakeTable = Callable[[Callable[[str], Any]], Table]


class _Rules(NamedTuple):
    """How one tokenizer's tokens become text."""

    stream: Callable[[], TextStream]
    whole: Decode | None  # None: only the stream knows


class Detokenizer:
    """Turns the ids that one tokenizer made into text. One serves all sequences.

    Args:
        tokenizer: decides by its decoder; is not changed.
        kind: what the model generates, a continuation or a text of its own.
        eos_token_ids: tokens that end a sequence.
        output_special_tokens: whether special tokens are shown; an EOS at the very end never is.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        kind: ModelKind,
        *,
        eos_token_ids: Collection[int],
        output_special_tokens: bool,
    ) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self._hidden = set() if output_special_tokens else special
        self._tokenizer = tokenizer
        self._last_eos = frozenset(eos_token_ids if output_special_tokens else ())
        self._rules = _rules(tokenizer, kind is ModelKind.DECODER_ONLY, self._table)

    def stream(self) -> TextStream:
        """Return the empty text of a new sequence."""
        stream = self._rules.stream()
        return LastEosStream(stream, self._last_eos) if self._last_eos else stream

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a whole sequence: what a stream of it adds up to."""
        if self._rules.whole is None:
            stream = self.stream()
            return "".join(map(stream.add, ids)) + stream.finish()
        if ids and ids[-1] in self._last_eos:
            ids = ids[:-1]
        tokens = [token for token_id in ids if (token := self._token(token_id)) is not None]
        return self._rules.whole(tokens).rstrip(BROKEN)

    def _token(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(token_id)
        return None if token in self._hidden else token

    def _table(self, entry: Callable[[str], Any]) -> Table:
        return Table(self._token, entry)


def _rules(tokenizer: tokenizers.Tokenizer, causal: bool, table: MakeTable) -> _Rules:
    decoder = tokenizer.decoder
    if decoder is None:
        return _undecoded(causal, table)
    decode: Decode = decoder.decode
    steps = _steps(json.loads(decoder.__getstate__()))
    while len(steps) > 1 and steps[-1]["type"] == "Fuse":  # what comes out is joined anyway
        steps.pop()
    match [step["type"] for step in steps]:
        case ["ByteLevel"]:
            return _byte_level(decode, table)
        case ["BPEDecoder"]:
            return _suffixed(decode, table)
        case ["CTC"]:
            return _deduplicated(decode, table)
    if _is_per_token(steps) and decode([_CONTEXT]) == _CONTEXT:
        return _per_token(steps, decode, causal, table)
    tokens = table(str)
    return _Rules(lambda: WindowStream(tokens, decode, _CONTEXT, begins=not causal), None)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the decoder's steps in order, nested sequences flattened."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _undecoded(causal: bool, table: MakeTable) -> _Rules:
    body = table(lambda token: " " + token)
    opening = Opening() if causal else Opening(table(str))

    def whole(tokens: list[str]) -> str:
        text = " ".join(tokens)
        return " " + text if causal and tokens else text

    return _Rules(lambda: PieceStream(body, opening), whole)


def _byte_level(decode: Decode, table: MakeTable) -> _Rules:
    values = _byte_level_alphabet()

    def entry(token: str) -> str | bytes:
        try:
            data = bytes([values[char] for char in token])
        except KeyError:  # an added token in plain text
            return token
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    entries = table(entry)
    return _Rules(lambda: Utf8Stream(entries), decode)


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte for each character of byte-level tokens.

    Source: GPT-2. Printable bytes of Latin-1 stand for themselves, the others, in order, for
    U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _suffixed(decode: Decode, table: MakeTable) -> _Rules:
    def entry(token: str) -> Suffixed:
        followed = decode([token, _CONTEXT])[: -len(_CONTEXT)]
        last = decode([token])
        same = [a == b for a, b in zip(followed, last, strict=False)]
        num_same = [*same, False].index(False)
        return Suffixed(last[:num_same], followed[num_same:], last[num_same:])

    entries = table(entry)
    return _Rules(lambda: SuffixStream(entries), decode)


def _deduplicated(decode: Decode, table: MakeTable) -> _Rules:
    entries = table(lambda token: (token, decode([token])))
    return _Rules(lambda: DedupStream(entries), decode)


def _is_per_token(steps: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends on nothing but being first, and on the byte tokens around."""
    types = [step["type"] for step in steps]
    num_head = types.index("Fuse") if "Fuse" in types else len(types)
    head, tail = types[:num_head], types[num_head:]
    has_bytes = "ByteFallback" in head
    return (
        _PER_TOKEN.issuperset(head)
        and {"Fuse", "Strip"}.issuperset(tail)
        and tail.count("Strip") + _first_differs(head) <= 1
        and not any(step.get("stop") for step in (steps if has_bytes else steps[num_head:]))
        and not (has_bytes and ("WordPiece" in head or head.index("ByteFallback") + 1 < num_head))
    )


def _first_differs(types: Collection[str]) -> bool:
    return "Metaspace" in types or "WordPiece" in types


def _per_token(
    steps: list[dict[str, Any]], decode: Decode, causal: bool, table: MakeTable
) -> _Rules:
    types = [step["type"] for step in steps]
    has_bytes = "ByteFallback" in types

    def entry(token: str, context: Sequence[str] = _CONTEXT) -> str | bytes:
        if has_bytes and _BYTE_TOKEN.fullmatch(token):
            return _byte(token)
        return decode([*context, token])[len(context) :]

    def whole(tokens: list[str]) -> str:
        if has_bytes:
            tokens = _part_runs(tokens)
        return decode([_CONTEXT, *tokens])[len(_CONTEXT) :] if causal else decode(tokens)

    opening = Opening()
    if not causal and _first_differs(types):
        opening = Opening(table(lambda token: entry(token, "")))
    elif not causal and "Fuse" in types and steps[-1]["type"] == "Strip":
        opening = Opening(None, steps[-1]["content"], steps[-1]["start"])
    body = table(entry)
    return _Rules(lambda: PieceStream(body, opening), whole)


def _byte(token: str) -> bytes:
    return bytes([int(token[3:5], 16)])


def _part_runs(tokens: list[str]) -> list[str]:
    """End each run of byte tokens where its last complete character ends, by an empty token."""
    parted: list[str] = []
    for is_byte, group in groupby(tokens, lambda token: bool(_BYTE_TOKEN.fullmatch(token))):
        run = list(group)
        if is_byte:
            run.insert(_num_valid(b"".join(map(_byte, run))), "")
        parted += run
    return parted


def _num_valid(data: bytes) -> int:
    """Return how many bytes from the start are complete characters."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)
