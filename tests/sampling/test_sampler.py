"""The whole sampler against a scalar twin, and its promises: independence, hostile values."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sampling.twin import StableTopP, Twin

from tgis.sampling import Choice, Sampler
from tgis.sampling.sampler import NOT_FINITE
from tgis.types import NO_DETAILS, DetailParams, SamplingParams, TokenDetails

EOS = (2, 7)
ALL = DetailParams(logprobs=True, ranks=True, top_n=5, output=True)


def f32(value: float) -> float:
    """As a parameter that has come over the wire."""
    return float(np.float32(value))


def random_params(rng: random.Random) -> SamplingParams:
    def maybe(value: float, off: float, chance: float = 0.5) -> float:
        return f32(value) if rng.random() < chance else off

    return SamplingParams(
        do_sample=rng.random() < 0.8,
        temperature=maybe(rng.uniform(0.05, 3), 1.0),
        top_k=rng.choice([0, 0, 1, 2, 10, 50, 300, 5000]),
        top_p=maybe(rng.uniform(0.05, 1), 1.0),
        typical_p=maybe(rng.uniform(0.05, 1), 1.0, 0.3),
        seed=rng.getrandbits(64),
        repetition_penalty=maybe(rng.uniform(0.5, 3), 1.0),
        length_penalty_start=rng.randrange(4),
        length_penalty_decay=maybe(rng.uniform(1, 3), 1.0),
        min_new_tokens=rng.choice([0, 0, 2]),
    )


def random_details(rng: random.Random, vocab_size: int) -> DetailParams:
    return DetailParams(
        logprobs=rng.random() < 0.7,
        ranks=rng.random() < 0.7,
        top_n=rng.choice([0, 1, 5, 10, vocab_size, vocab_size + 3]),
        output=rng.random() < 0.8,
    )


def assert_close(ours: TokenDetails, theirs: TokenDetails) -> None:
    assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-5, abs=1e-5)
    assert ours.rank == theirs.rank
    assert {i for i, _ in ours.top} == {i for i, _ in theirs.top}
    expected = dict(theirs.top)
    for i, logprob in ours.top:
        assert logprob == pytest.approx(expected[i], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vocab_size", [8, 40, 512, 3001, 20011])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_equals_the_twin(vocab_size: int, spread: float) -> None:
    """Random batches in which every row has other parameters, over some steps."""
    rng = random.Random(f"{vocab_size} {spread}")
    generator = torch.Generator().manual_seed(vocab_size)
    for _ in range(3):
        sampler, twins = Sampler(vocab_size, EOS), []
        for i in range(10):
            params, details = random_params(rng), random_details(rng, vocab_size)
            prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 50))]
            sampler.add(i, params, details, prompt)
            twins.append(Twin(params, details, prompt, list(EOS)))
        for _ in range(4):
            logits = torch.randn((10, vocab_size), generator=generator) * spread
            expected = [twin.step(row) for twin, row in zip(twins, logits, strict=True)]
            for twin, choice, (token, details) in zip(
                twins, sampler.sample(range(10), logits), expected, strict=True
            ):
                assert choice.error is None
                assert choice.token_id == token, twin.params
                if twin.details.output:
                    assert choice.details is not None
                    assert_close(choice.details, details)
                else:
                    assert choice.details is None


class TieTwin(Twin):
    top_p_warper = StableTopP


def test_ties_as_in_the_twin() -> None:
    """Coarse logits, as bfloat16 engines give them, tie everywhere."""
    rng, vocab_size = random.Random(5), 700
    generator = torch.Generator().manual_seed(5)
    sampler, twins = Sampler(vocab_size, EOS), []
    for i in range(24):
        params = SamplingParams(
            do_sample=i % 4 != 0,
            temperature=rng.choice([1.0, 2.0, 0.5]),
            top_k=rng.choice([0, 3, 40]),
            top_p=rng.choice([1.0, f32(0.3), f32(0.8)]),
            seed=i,
        )
        details = DetailParams(logprobs=i % 3 != 0, ranks=True, top_n=3, output=True)
        sampler.add(i, params, details, [1])
        twins.append(TieTwin(params, details, [1], list(EOS)))
    for _ in range(5):
        logits = (torch.randn((24, vocab_size), generator=generator) * 4).round() / 2
        expected = [twin.step(row) for twin, row in zip(twins, logits, strict=True)]
        for choice, (token, details) in zip(
            sampler.sample(range(24), logits), expected, strict=True
        ):
            assert choice.token_id == token
            assert choice.details is not None
            assert_close(choice.details, details)
            assert [i for i, _ in choice.details.top] == [i for i, _ in details.top]


def run(
    vocab_size: int,
    rows: list[tuple[SamplingParams, DetailParams, list[int]]],
    logits: torch.Tensor,
    order: list[int],
) -> dict[int, list[Choice]]:
    """Sample the named rows together, in the given order, at every step of logits [steps, n, v]."""
    sampler = Sampler(vocab_size, EOS)
    for i in order:
        sampler.add(i, *rows[i])
    chosen: dict[int, list[Choice]] = {i: [] for i in order}
    for step in logits:
        for i, choice in zip(order, sampler.sample(order, step[order].clone()), strict=True):
            chosen[i].append(choice)
    return chosen


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_a_row_knows_no_neighbours(data: st.DataObject) -> None:
    """Bit for bit the same alone, in any mix, at any place."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    vocab_size = data.draw(st.sampled_from([5, 33, 512, 4099, 20011]))
    count = data.draw(st.integers(2, 9))
    rows = [
        (random_params(rng), random_details(rng, vocab_size), rng.choices(range(vocab_size), k=9))
        for _ in range(count)
    ]
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = torch.randn((3, count, vocab_size), generator=generator) * rng.uniform(0.1, 8)
    if data.draw(st.booleans()):
        logits = logits.bfloat16().float()
    order = data.draw(st.permutations(range(count)))
    mixed = run(vocab_size, rows, logits, order)
    for i in range(count):
        assert run(vocab_size, rows, logits, [i])[i] == mixed[i]
    part = order[: count // 2 + 1]
    for i, choices in run(vocab_size, rows, logits, part).items():
        assert choices == mixed[i]


def test_a_wide_neighbour_changes_no_bit() -> None:
    """Batches of candidates are as wide as their widest row."""
    vocab_size = 30_000
    rows = [
        (SamplingParams(do_sample=True, top_k=k, top_p=f32(p), seed=k), ALL, [3])
        for k, p in [(5, 0.9), (2000, 1.0), (40, 0.5), (0, 0.3), (0, 0.999), (1, 1.0), (900, 0.99)]
    ]
    logits = torch.randn((4, len(rows), vocab_size), generator=torch.Generator().manual_seed(1)) * 4
    together = run(vocab_size, rows, logits, list(range(len(rows))))
    for i in range(len(rows)):
        assert run(vocab_size, rows, logits, [i])[i] == together[i]


def test_threads_change_no_bit() -> None:
    vocab_size = 40_000
    rows = [
        (SamplingParams(do_sample=True, typical_p=f32(0.7), seed=1), ALL, [3]),
        (SamplingParams(do_sample=True, top_p=f32(0.95), seed=2), ALL, [3]),
        (SamplingParams(do_sample=True, seed=3), ALL, [3]),
        (SamplingParams(), ALL, [3]),
    ]
    logits = torch.randn((2, 4, vocab_size), generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(vocab_size, rows, logits, [0, 1, 2, 3]))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


GOOD = SamplingParams(do_sample=True, top_k=4, seed=3)
EVERY_WAY = [
    SamplingParams(),
    GOOD,
    SamplingParams(do_sample=True, seed=1),
    SamplingParams(do_sample=True, seed=1, top_p=0.5),
    SamplingParams(do_sample=True, seed=1, typical_p=0.5),
    SamplingParams(repetition_penalty=1.5, length_penalty_decay=2.0),
]


@pytest.mark.parametrize("params", EVERY_WAY)
@pytest.mark.parametrize("details", [ALL, NO_DETAILS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hostile_row_fails_alone(
    params: SamplingParams, details: DetailParams, value: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 600), generator=generator)
    calm = Sampler(600, EOS)
    hostile = Sampler(600, EOS)
    for sampler in (calm, hostile):
        for i, row in enumerate([GOOD, params, SamplingParams()]):
            sampler.add(i, row, details, [1, 5])
    expected = calm.sample([0, 2], logits[[0, 2]])
    poisoned = logits.clone()
    poisoned[1, 599] = value
    choices = hostile.sample([0, 1, 2], poisoned)
    assert choices[1] == Choice(-1, None, NOT_FINITE)
    assert [choices[0], choices[2]] == expected
    # The failed row has not moved: it goes on like one that never failed.
    assert hostile.sample([1], logits[1:2].clone()) == calm.sample([1], logits[1:2].clone())


@pytest.mark.parametrize("params", EVERY_WAY)
def test_nothing_to_choose(params: SamplingParams) -> None:
    sampler = Sampler(5, EOS)
    sampler.add(1, params, ALL, [])
    assert sampler.sample([1], torch.full((1, 5), -torch.inf)) == [Choice(-1, None, NOT_FINITE)]


def test_overflow_by_temperature_fails_alone() -> None:
    sampler = Sampler(600, EOS)
    for i in range(2):
        sampler.add(i, SamplingParams(do_sample=True, temperature=f32(0.05)), NO_DETAILS, [])
    logits = torch.zeros((2, 600))
    logits[1, 3] = 1e38
    choices = sampler.sample([0, 1], logits)
    assert choices[0].error is None
    assert choices[1].error == NOT_FINITE


@pytest.mark.parametrize("params", EVERY_WAY)
def test_minus_infinity_is_no_error(params: SamplingParams) -> None:
    """A masked vocabulary: only what is left is chosen and shown."""
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, [11, 2044]] = torch.tensor([1.0, 2.0])
    sampler = Sampler(3000, EOS)
    sampler.add(1, params, ALL, [])
    (choice,) = sampler.sample([1], logits)
    assert choice.token_id in (11, 2044)
    assert choice.details is not None
    assert {i for i, _ in choice.details.top} <= {11, 2044}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    decay=st.floats(1, 10, width=32),
    penalty=st.floats(f32(1e-38), f32(1e38), width=32),
    temperature=st.floats(f32(0.05), f32(3e38), width=32),
    top_p=st.floats(f32(1e-38), 1, width=32),
    typical_p=st.floats(f32(1e-38), 1, width=32),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 30.0]),
)
def test_no_parameter_breaks_a_finite_row(
    decay: float,
    penalty: float,
    temperature: float,
    top_p: float,
    typical_p: float,
    top_k: int,
    seed: int,
    scale: float,
) -> None:
    sampler = Sampler(300, EOS)
    base = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        seed=seed,
        repetition_penalty=penalty,
        length_penalty_decay=decay,
    )
    sampler.add(0, base, ALL, list(range(0, 300, 3)))
    sampler.add(
        1, SamplingParams(**{**_fields(base), "do_sample": True}), ALL, list(range(0, 300, 3))
    )
    logits = torch.randn((2, 300), generator=torch.Generator().manual_seed(1)) * scale
    for row in sampler._sequences.values():
        row.num_generated = 100_000  # where 10 ** tokens has long overflowed
    for choice in sampler.sample([0, 1], logits):
        assert choice.error is None
        assert choice.details is not None
        assert np.isfinite(choice.details.logprob)


def _fields(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def test_min_new_tokens_then_length_penalty() -> None:
    """EOS, every one of the list, is impossible twice, then grows until it wins."""
    sampler = Sampler(6, EOS)
    params = SamplingParams(min_new_tokens=2, length_penalty_start=2, length_penalty_decay=2.0)
    sampler.add(1, params, ALL, [])
    row = torch.tensor([[0.0, 0.0, 1.0, 5.0, 0.0, 0.0]])
    tokens = []
    for _ in range(7):
        (choice,) = sampler.sample([1], row.clone())
        assert choice.details is not None
        tokens.append(choice.token_id)
        assert (2 in dict(choice.details.top)) == (len(tokens) > 2)
    assert tokens == [3, 3, 3, 3, 3, 2, 2]  # 1, 2, 4, 8: the start itself is not past


def test_repetition_penalty_meets_each_real_id_once() -> None:
    sampler = Sampler(6, EOS)
    details = DetailParams(logprobs=True, top_n=6, output=True)
    sampler.add(1, SamplingParams(repetition_penalty=2.0), details, [4, 4, 4, 99])
    (first,) = sampler.sample([1], torch.tensor([[1.0, -1.0, 0.0, 3.0, 4.0, -2.0]]))
    assert first.token_id == 3  # 4.0 / 2 < 3
    scores = torch.tensor([1.0, -1.0, 0.0, 1.5, 2.0, -2.0])
    (second,) = sampler.sample([1], torch.tensor([[1.0, -1.0, 0.0, 3.0, 4.0, -2.0]]))
    assert second.token_id == 4
    assert second.details is not None
    assert dict(second.details.top) == pytest.approx(
        dict(enumerate(scores.log_softmax(0).tolist()))
    )


def test_greedy_leaves_logits_alone_and_needs_no_finite_losers() -> None:
    sampler = Sampler(4, EOS)
    sampler.add(1, SamplingParams(), NO_DETAILS, [])
    logits = torch.tensor([[0.5, 2.0, -torch.inf, 2.0]])
    assert sampler.sample([1], logits) == [Choice(1)]
    assert logits.tolist() == [[0.5, 2.0, -torch.inf, 2.0]]


def test_misuse_is_refused() -> None:
    sampler = Sampler(4, EOS)
    sampler.add(1, SamplingParams(), NO_DETAILS, [])
    with pytest.raises(ValueError, match="registered already"):
        sampler.add(1, SamplingParams(), NO_DETAILS, [])
    with pytest.raises(ValueError, match=r"logits are \(1, 5\), not \(1, 4\)"):
        sampler.sample([1], torch.zeros((1, 5)))
    with pytest.raises(KeyError):
        sampler.sample([2], torch.zeros((1, 4)))
    sampler.remove(1)
    sampler.remove(1)
    assert sampler.sample([], torch.zeros((0, 4))) == []
