"""Turning documents into rectangular batches of token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tokenizer import BOS_ID, EOS_ID, PAD_ID

Rewrite = Callable[[str], str]
ECHO_LENGTH = 4
NO_ECHO = PAD_ID


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs, the tokens that follow them, and those that a mere echo would put there."""

    ids: Tensor
    targets: Tensor
    echoes: Tensor


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """BOS, the text, EOS for each document."""
    return [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch_fast(list(documents))]


def echoes(window: Sequence[int]) -> list[int]:
    """For each token but the last: what came after the same few tokens earlier in its document.

    NO_ECHO where they are new, or where the text itself does go on as it did before.
    """
    followers: dict[tuple[int, ...], int] = {}
    found = [NO_ECHO] * (len(window) - 1)
    for end in range(len(window) - 1):
        if window[end] == BOS_ID:
            followers.clear()
        recent = tuple(window[max(0, end + 1 - ECHO_LENGTH) : end + 1])
        follower = window[end + 1]
        if followers.get(recent, follower) != follower:
            found[end] = followers[recent]
        followers[recent] = follower
    return found


class WindowStream:
    """Endless windows of whole documents; only a window's last document is cut at its edge.

    Each window begins with BOS because generation does: position 0 never shows the middle of
    a text. Documents are rewritten and shuffled anew in every epoch.
    """

    def __init__(
        self, tokenizer: Tokenizer, documents: Sequence[str], rewrite: Rewrite, seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._documents = list(documents)
        self._rewrite = rewrite
        self._random = random.Random(seed)
        self._encoded = self._endless()

    def batch(self, rows: int, context: int) -> Batch:
        """Tensors of (rows, context)."""
        windows = [self._window(context + 1) for _ in range(rows)]
        tokens = torch.tensor(windows)
        return Batch(
            ids=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            echoes=torch.tensor([echoes(window) for window in windows]),
        )

    def _window(self, length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids.extend(next(self._encoded))
        return ids[:length]

    def _endless(self) -> Iterator[list[int]]:
        while True:
            self._random.shuffle(self._documents)
            for start in range(0, len(self._documents), 1024):
                chunk = [self._rewrite(d) for d in self._documents[start : start + 1024]]
                yield from encode_documents(self._tokenizer, chunk)
