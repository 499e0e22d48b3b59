"""From a request's seed to the exponential noise that chooses its tokens.

TGIS draws `torch.empty(vocab).exponential_(1, generator=g)` once per token from a generator of the
request's own (`torch.Generator("cpu").manual_seed(seed)`). That stream is a Mersenne Twister
(MT19937, seeded with the low 32 bits of the seed), two words a sample, u = 53 bits of them,
noise = -log1p(-u). NumPy has the same generator and draws its words five times faster, and most
logarithms are never looked at: the words are drawn for the whole vocabulary, so that the stream
keeps its place, the logarithm is taken only where a token can still be chosen.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MANTISSA = np.uint64((1 << 53) - 1)
_UNIT = 2.0**-53


class NoiseStream:
    """The noise of one seeded request: a row over the vocabulary per token.

    Args:
        seed: any uint64. As in torch only its low 32 bits count.
        vocab_size: samples in a row.
    """

    __slots__ = ("_generator", "_vocab_size")

    def __init__(self, seed: int, vocab_size: int) -> None:
        twister = np.random.MT19937()
        twister.state = _seeded_state(seed & 0xFFFFFFFF)
        self._generator = np.random.Generator(twister)
        self._vocab_size = vocab_size

    def next_row(self) -> NDArray[np.uint64]:
        """The next token's row: 64 random bits for each vocabulary entry."""
        return self._generator.integers(
            0, 0xFFFFFFFFFFFFFFFF, self._vocab_size, dtype=np.uint64, endpoint=True
        )


def _seeded_state(seed: int) -> Any:
    """The state that torch's `manual_seed` makes of the seed, too: the twister's first seeding."""
    return np.random.RandomState(seed).get_state(legacy=False)


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random bits as numbers in [0, 1)."""
    numbers: NDArray[np.float64] = np.asarray((bits & _MANTISSA) * _UNIT, np.float64)
    return numbers


def exponential(bits: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Random bits as Exp(1) noise in float32, never below the bits' own `uniform`."""
    noise: NDArray[np.float32] = (-np.log1p(-uniform(bits))).astype(np.float32)
    return noise
