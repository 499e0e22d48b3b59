import numpy as np
import pytest
import torch

from tgis.sampling.seeds import NoiseStream, exponential, uniform


@pytest.mark.parametrize(
    "seed", [0, 1, 4242, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_stream_is_torch_s_own(seed: int) -> None:
    generator = torch.Generator("cpu")
    generator.manual_seed(seed)
    stream = NoiseStream(seed, 5003)
    for _ in range(3):
        theirs = torch.empty(5003).exponential_(1, generator=generator)
        assert np.array_equal(exponential(stream.next_row()), theirs.numpy())


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 312, 1000, 32000, 128256])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_vector_length_change_nothing(vocab_size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator("cpu").manual_seed(11)
        stream = NoiseStream(11, vocab_size)
        for _ in range(2):
            theirs = torch.empty(vocab_size).exponential_(1, generator=generator)
            assert np.array_equal(exponential(stream.next_row()), theirs.numpy())
    finally:
        torch.set_num_threads(before)


def test_noise_is_bounded_by_its_uniform() -> None:
    bits = NoiseStream(5, 100_000).next_row()
    assert (exponential(bits) * (1 + 1e-6) >= uniform(bits)).all()
    edge = np.array([0, 1, (1 << 53) - 1, (1 << 64) - 1], np.uint64)
    assert np.isfinite(exponential(edge)).all()
    assert (uniform(edge) < 1).all()


def test_only_low_32_bits_count() -> None:
    rows = [NoiseStream(seed, 64).next_row() for seed in (9, 9 + 2**32, 9 + 2**63)]
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], NoiseStream(10, 64).next_row())
