"""Text to token ids, in threads.

The tokenizer is shared by all threads, so nothing here sets truncation, padding or any other state
on it: ids are cut afterwards. Batch calls of one text are used because they, unlike `encode`,
release the interpreter lock.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers

from tgis.errors import GenerationFailed, InvalidRequest, ModelError
from tgis.hub.tokenizer_settings import kept_bos

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoding:
    """The token ids of one input, truncated, and how many there were before."""

    ids: list[int]
    num_raw_tokens: int


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """What the Tokenize call says of one text."""

    count: int
    tokens: list[str] = field(default_factory=list)  # vocabulary strings
    offsets: list[tuple[int, int]] = field(default_factory=list)  # UTF-8 bytes; start, end


class TextTokenizer:
    """A model's fast tokenizer and the threads that use it; made by `load`.

    Args:
        tokenizer: without truncation and padding; not changed by anybody from now on.
        workers: number of threads.
        add_special_tokens: whether BOS, EOS and the like belong to an input.
        bos_token_id: takes the first place of a truncated input; None leaves it to the input.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        workers: int,
        add_special_tokens: bool,
        bos_token_id: int | None,
    ) -> None:
        self.raw = tokenizer
        self._add_special_tokens = add_special_tokens
        self._bos_token_id = bos_token_id
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        workers: int,
        add_special_tokens: bool = True,
        max_sequence_length: int,
    ) -> "TextTokenizer":
        """Read `tokenizer.json` and what the configuration files beside it say of BOS.

        Raises:
            ModelError: a file is missing or broken.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"no such file: {path}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"cannot read {path}: {error}") from error
        if tokenizer.truncation is not None:
            logger.warning(
                "Ignoring fast tokenizer truncation configuration with max_length %s, "
                "max_sequence_length is set to %s",
                tokenizer.truncation["max_length"],
                max_sequence_length,
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        bos = kept_bos(directory) if add_special_tokens else None
        return cls(
            tokenizer,
            workers=workers,
            add_special_tokens=add_special_tokens,
            bos_token_id=None if bos is None else tokenizer.token_to_id(bos),
        )

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, truncate: int) -> Encoding:
        """Return the ids of an input; of more than `truncate` > 0 the last ones.

        Raises:
            InvalidRequest: the tokenizer cannot take the text.
        """
        try:
            return await self._in_thread(self._encode, text, truncate)
        except _TokenizerError as error:
            raise InvalidRequest(f"tokenizer error {error}") from None

    async def describe(
        self, text: str, truncate: int, want_tokens: bool, want_offsets: bool
    ) -> TokenizeResult:
        """Return count and, if wanted, strings and byte offsets of the tokens of a text.

        Of more than `truncate` > 0 tokens only the last ones count. Special tokens are at (0, 0).

        Raises:
            GenerationFailed: the tokenizer cannot take the text.
        """
        try:
            return await self._in_thread(self._describe, text, truncate, want_tokens, want_offsets)
        except _TokenizerError as error:
            raise GenerationFailed(str(error)) from None

    def token_string(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it, "" if there is none with this id."""
        return (self.raw.id_to_token(token_id) or "") if token_id >= 0 else ""

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _encode(self, text: str, truncate: int) -> Encoding:
        ids: list[int] = self._run(self.raw.encode_batch_fast, text).ids
        if not 0 < truncate < len(ids):
            return Encoding(ids, len(ids))
        kept = ids[-truncate:]
        if self._bos_token_id is not None:
            kept[0] = self._bos_token_id
        return Encoding(kept, len(ids))

    def _describe(
        self, text: str, truncate: int, want_tokens: bool, want_offsets: bool
    ) -> TokenizeResult:
        encode = self.raw.encode_batch if want_offsets else self.raw.encode_batch_fast
        encoding = self._run(encode, text)
        num_skipped = max(0, len(encoding) - truncate) if truncate else 0
        tokens = [self.token_string(i) for i in encoding.ids[num_skipped:]] if want_tokens else []
        offsets = _byte_offsets(text, encoding, num_skipped) if want_offsets else []
        return TokenizeResult(len(encoding) - num_skipped, tokens, offsets)

    def _run(self, encode: Callable[..., list[Any]], text: str) -> Any:
        try:
            return encode([text], add_special_tokens=self._add_special_tokens)[0]
        except TypeError:  # what the library makes of lone surrogates
            raise _TokenizerError("text is not valid Unicode") from None
        except Exception as error:  # the library raises nothing narrower
            raise _TokenizerError(str(error)) from None


class _TokenizerError(Exception):
    """The tokenizer refused a text."""


def _byte_offsets(text: str, encoding: Any, num_skipped: int) -> list[tuple[int, int]]:
    """Return the place of each token in UTF-8 bytes, (0, 0) for special ones.

    Token by token, because `encoding.offsets` would hold the interpreter lock for all at once.
    """
    numbers = range(num_skipped, len(encoding))
    spans = (encoding.token_to_chars(number) or (0, 0) for number in numbers)
    if text.isascii():
        return list(spans)
    chars = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (chars > 0x7F) + (chars > 0x7FF) + (chars > 0xFFFF)
    byte_of = np.concatenate(([0], np.cumsum(sizes))).data
    return [(byte_of[start], byte_of[end]) for start, end in spans]
