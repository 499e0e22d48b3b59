import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgis.sampling.candidates import head, nucleus, pack


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 100, 2048, 5000, 40_000]),
    count=st.integers(1, 700),
    coarse=st.booleans(),
    temperature=st.floats(0.125, 8, width=32),
)
def test_head_misses_nothing(
    seed: int, vocab_size: int, count: int, coarse: bool, temperature: float
) -> None:
    """All that reaches the count-th highest score, after the division by the temperature too."""
    rng = np.random.default_rng(seed)
    row = rng.normal(size=vocab_size).astype(np.float32)
    row[rng.random(vocab_size) < 0.2] = -np.inf
    if coarse:
        row = np.round(row * 4) / 4
    found = head(row, count)
    scaled = row / np.float32(temperature)
    wanted = np.flatnonzero(scaled >= np.sort(scaled)[max(vocab_size - count, 0)])
    assert set(wanted) <= set(found)
    assert (np.diff(found) > 0).all()


def test_head_is_short() -> None:
    row = np.random.default_rng(1).normal(size=32_000).astype(np.float32)
    assert 50 <= len(head(row, 50)) <= 60


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_head_bears_hostile_rows(value: float) -> None:
    row = np.random.default_rng(1).normal(size=9000).astype(np.float32)
    row[::2] = value
    for count in (1, 50, 1000):
        assert not np.isnan(row[head(row, count)]).any()
    head(np.full(9000, value, np.float32), 5)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_nucleus_misses_nothing(top_p: float, temperature: float) -> None:
    rng = np.random.default_rng(2)
    few = 0
    for _ in range(20):
        row = (rng.normal(size=20_000) * rng.uniform(1, 8)).astype(np.float32)
        found = nucleus(row, temperature, top_p)
        probs = np.exp((row.astype(np.float64) - row.max()) / temperature)
        order = np.argsort(-row, kind="stable")
        before = np.cumsum(probs[order]) - probs[order]
        wanted = order[before / probs.sum() < top_p]
        if found is None:
            assert len(wanted) > 8000
        else:
            few += 1
            ids, rest = found
            assert set(wanted) <= set(ids)
            outside = np.delete(probs, ids).sum()
            assert rest == pytest.approx(outside, rel=1e-3, abs=1e-5 * probs.sum())
    assert few or (temperature > 1 and top_p > 0.5)


def test_pack_pads() -> None:
    rows = [np.array([1, 5, 3], np.float32), np.array([7, 8, 9], np.float32)]
    packed = pack(rows, [np.array([1]), np.array([0, 2])])
    assert packed.ids.tolist() == [[1, -1], [0, 2]]
    assert packed.scores.tolist() == [[5, -np.inf], [7, 9]]
