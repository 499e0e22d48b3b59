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
        if token_id in self._known:
            return
        count = len(self._known)
        if count == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[count] = token_id
        self._known.add(token_id)

    def forget_after(self, count: int) -> None:
        """Keep only the `count` ids that were there first."""
        self._known.difference_update(self.ids[count:].tolist())


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

    def mark(self) -> tuple[int, int, object]:
        """Where it stands before a token is chosen."""
        num_seen = 0 if self.seen is None else len(self.seen.ids)
        return self.num_generated, num_seen, None if self.noise is None else self.noise.mark()

    def rewind(self, mark: tuple[int, int, object]) -> None:
        """The token was not chosen after all."""
        self.num_generated, num_seen, place = mark
        if self.seen is not None:
            self.seen.forget_after(num_seen)
        if self.noise is not None:
            self.noise.rewind(place)

    def advance(self, token_id: int) -> None:
        """Account for one chosen token."""
        self.num_generated += 1
        if self.seen is not None:
            self.seen.add(token_id)
