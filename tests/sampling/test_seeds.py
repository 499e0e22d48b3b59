"""Both noise streams are torch's `exponential_`, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tgis.sampling.native import library
from tgis.sampling.seeds import NativeStream, NoiseStream, NumpyStream, noise_stream

needs_library = pytest.mark.skipif(library() is None, reason="no C compiler here")
KINDS = [NumpyStream, pytest.param(NativeStream, marks=needs_library)]
Kind = Callable[[int, int], NoiseStream]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "seed", [0, 1, 4242, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_stream_is_torch_s_own(kind: Kind, seed: int) -> None:
    generator = torch.Generator("cpu")
    generator.manual_seed(seed)
    stream = kind(seed, 5003)
    for _ in range(3):
        theirs = torch.empty(5003).exponential_(1, generator=generator)
        assert np.array_equal(stream.at(np.arange(5003)), theirs.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 311, 312, 313, 1000, 32000, 128256])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_vector_length_change_nothing(
    kind: Kind, vocab_size: int, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator("cpu").manual_seed(11)
        stream = kind(11, vocab_size)
        for _ in range(2):
            theirs = torch.empty(vocab_size).exponential_(1, generator=generator)
            assert np.array_equal(stream.at(np.arange(vocab_size)), theirs.numpy())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 5, 312, 3001, 32000])
def test_some_ids_and_winners_are_those_of_the_whole_row(kind: Kind, vocab_size: int) -> None:
    """Whatever is asked of a row, the next one follows it."""
    generator = torch.Generator("cpu").manual_seed(8)
    stream = kind(8, vocab_size)
    rng = np.random.default_rng(vocab_size)
    for step in range(30):
        theirs = torch.empty(vocab_size).exponential_(1, generator=generator)
        if step % 3:
            scores = torch.from_numpy(rng.normal(size=vocab_size).astype(np.float32) * step)
            scores[rng.random(vocab_size) < 0.3] = -torch.inf
            scores[rng.integers(vocab_size)] = 0.5
            probs = scores.softmax(-1)
            assert stream.winner(probs.numpy()) == int((probs / theirs).argmax())
        else:
            ids = np.flatnonzero(rng.random(vocab_size) < step / 60)
            noise = stream.at(np.append(ids, [-1, -1]))
            assert np.array_equal(noise[:-2], theirs.numpy()[ids])
            assert (noise[-2:] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_low_32_bits_count(kind: Kind) -> None:
    ids = np.arange(64)
    rows = [kind(seed, 64).at(ids) for seed in (9, 9 + 2**32, 9 + 2**63, 10)]
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], rows[3])


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_exponential(kind: Kind) -> None:
    noise = kind(5, 200_000).at(np.arange(200_000)).astype(np.float64)
    assert (noise > 0).all()
    assert noise.mean() == pytest.approx(1, abs=0.01)
    assert noise.var() == pytest.approx(1, abs=0.03)


def test_the_best_stream_is_taken() -> None:
    expected = NumpyStream if library() is None else NativeStream
    assert isinstance(noise_stream(1, 8), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_back_to_its_mark(kind: Kind) -> None:
    stream, ids = kind(5, 3001), np.arange(3001)
    stream.at(ids)
    mark = stream.mark()
    expected = [stream.at(ids) for _ in range(2)]
    for _ in range(2):
        stream.rewind(mark)
        assert np.array_equal([stream.at(ids) for _ in range(2)], expected)
