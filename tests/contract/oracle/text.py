"""Text to ids and back: counting, truncation, detokenisation, stop sequences."""

import json
from pathlib import Path

from tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
# Decoders that swallow the space before the first word, which a causal model's output keeps.
EATS_LEADING_SPACE = {"Metaspace", "WordPiece", "Sequence"}


class Text:
    """The tokenizer of a model directory, with the rules of the TGIS api.

    Args:
        causal: the output continues the input (and does not stand for itself).
        show_special: special tokens are part of the text.
    """

    def __init__(self, directory: Path, causal: bool, show_special: bool) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = json.loads((directory / "tokenizer_config.json").read_text())
        # The reference asks the tokenizer object, and the plain fast class has no such attribute.
        plain = config.get("tokenizer_class") == "PreTrainedTokenizerFast"
        self.adds_bos = bool(config.get("add_bos_token")) and not plain
        bos = config.get("bos_token")
        name = bos["content"] if isinstance(bos, dict) else bos
        self.bos_id = None if name is None else self.tokenizer.token_to_id(name)
        decoder = json.loads(self.tokenizer.to_str())["decoder"]
        self.decoder = None if decoder is None else decoder["type"]
        self.causal = causal
        self.show_special = show_special

    def token(self, token_id: int) -> str:
        """The vocabulary's string of an id, empty for an unknown one."""
        return self.tokenizer.id_to_token(token_id) or ""

    def encode(self, text: str, truncate: int = 0) -> list[int]:
        """Ids with special tokens; of more than `truncate` > 0 the last ones, the first of which
        becomes BOS where the tokenizer adds one.
        """
        ids: list[int] = self.tokenizer.encode(text).ids
        if 0 < truncate < len(ids):
            ids = ids[-truncate:]
            if self.adds_bos and self.bos_id is not None:
                ids[0] = self.bos_id
        return ids

    def tokenize(self, text: str, truncate: int = 0) -> list[tuple[str, int, int]]:
        """(token, start, end) with offsets in UTF-8 bytes; truncated without the BOS rule."""
        encoding = self.tokenizer.encode(text)
        rows = [
            (token, len(text[:start].encode()), len(text[:end].encode()))
            for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True)
        ]
        return rows[-truncate:] if truncate else rows

    def decode(self, ids: list[int]) -> str:
        """The text of a whole output, without characters that are still incomplete at its end."""
        return self._decode(ids).rstrip(BROKEN)

    def _decode(self, ids: list[int]) -> str:
        if not ids or not self.causal:
            return self._plain(ids)
        if self.decoder is None:
            return " " + self._plain(ids)
        if self.decoder not in EATS_LEADING_SPACE:
            return self._plain(ids)
        shield = self.tokenizer.encode("A", add_special_tokens=False).ids
        return self._plain(shield + ids).removeprefix(self._plain(shield))

    def _plain(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not self.show_special)
        return text


def find_stop(text: bytes, num_new: int, stops: list[str]) -> tuple[str, int, int] | None:
    """The stop sequence that the newest bytes complete, and where it begins and ends.

    The first in the order of the request wins, and of its matches the last.

    Args:
        num_new: how many bytes at the end of `text` the newest token has added.
    """
    for stop in stops:
        wanted = stop.encode()
        window = max(0, len(text) - num_new - len(wanted) + 1)
        start = text.rfind(wanted, window)
        if num_new > 0 and start >= 0:
            return stop, start, start + len(wanted)
    return None
