"""What the sampler remembers of each sequence between two tokens."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tgis.sampling.seeds import NoiseStream, noise_stream
from tgis.types import DetailParams, SamplingParams


class SeenIds:
    """The distinct token ids of a sequence, as an array that grows."""

    __slots__ = ("_buffer", "_known", "_vocab_size")

    def __init__(self, ids: Iterable[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._known = {i for i in ids if 0 <= i < vocab_size}
        self._buffer = np.empty(len(self._known) + 64, dtype=np.int64)
        self._buffer[: len(self._known)] = list(self._known)

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 [distinct ids], in no particular order."""
        return self._buffer[: len(self._known)]

    def add(self, token_id: int) -> None:
        """Remember one more token."""
        count = len(self._known)
        self._known.add(token_id)
        if len(self._known) > count:
            if count == len(self._buffer):
                self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
            self._buffer[count] = token_id


class SequenceState:
    """One sequence: its parameters, and what its generated tokens have changed.

    Attributes:
        num_generated: tokens chosen so far.
        seen: ids that the repetition penalty meets; None where there is no penalty.
        noise: None for greedy sequences.
    """

    __slots__ = ("details", "noise", "num_generated", "params", "seen")

    def __init__(
        self,
        params: SamplingParams,
        details: DetailParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.params = params
        self.details = details
        self.num_generated = 0
        self.seen = SeenIds(prompt_ids, vocab_size) if params.repetition_penalty != 1.0 else None
        self.noise: NoiseStream | None = None
        if params.do_sample:
            self.noise = noise_stream(params.seed, vocab_size)

    def mark(self) -> object:
        """Where its noise stands before a token is chosen."""
        return None if self.noise is None else self.noise.mark()

    def rewind(self, mark: object) -> None:
        """The token was not chosen after all."""
        if self.noise is not None:
            self.noise.rewind(mark)

    def advance(self, token_id: int) -> None:
        """Account for one chosen token."""
        self.num_generated += 1
        if self.seen is not None:
            self.seen.add(token_id)
