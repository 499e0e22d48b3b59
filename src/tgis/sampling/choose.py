"""The seeded choice: TGIS's argmax(probability / exponential noise)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tgis.sampling.seeds import NoiseStream, exponential, uniform

_SLACK = 1 - 1e-5
_TINY = 2.0**-54


def noise_at(ids: NDArray[np.int64], streams: Sequence[NoiseStream]) -> NDArray[np.float32]:
    """The noise of some tokens of each of m rows, [m, width].

    Args:
        ids: [m, width], the tokens.
        streams: m; each moves on by one row.
    """
    return exponential(
        np.stack([stream.next_row()[own] for stream, own in zip(streams, ids, strict=True)])
    )


def anywhere(probs: NDArray[np.float32], stream: NoiseStream) -> int:
    """Choose a token of the whole vocabulary.

    -log1p(-u) >= u, so probability / u bounds the ratio from above; logarithms are taken only for
    the few tokens whose bound reaches what the best bound really scores.

    Args:
        probs: [vocab].
        stream: moves on by one row.
    """
    bits = stream.next_row()
    bound = probs / np.maximum(uniform(bits), _TINY)
    best = np.array([bound.argmax()])
    rivals = np.flatnonzero(bound >= _ratio(probs, bits, best)[0] * _SLACK)
    return int(rivals[_ratio(probs, bits, rivals).argmax()])


def _ratio(
    probs: NDArray[np.float32], bits: NDArray[np.uint64], ids: NDArray[np.intp]
) -> NDArray[np.float32]:
    ratio: NDArray[np.float32] = probs[ids] / exponential(bits[ids])
    return ratio
