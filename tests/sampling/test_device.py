"""Sampling in torch, on CPU tensors, against the host's sampler."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tgis.sampling import Sampler, device, input_details
from tgis.sampling.sampler import Choice, choose_on_device
from tgis.sampling.state import SequenceState
from tgis.types import NO_DETAILS, DetailParams, SamplingParams, TokenDetails

pytestmark = pytest.mark.usefixtures("single_thread")

VOCAB = 300
EOS = (3, 250)
ALL = DetailParams(output=True, logprobs=True, ranks=True, top_n=4)
PARAMS = [
    SamplingParams(),
    SamplingParams(min_new_tokens=3),
    SamplingParams(length_penalty_start=1, length_penalty_decay=1.5),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.4, min_new_tokens=2),
    *(
        SamplingParams(do_sample=True, seed=seed, **warpers)
        for seed, warpers in enumerate(
            [
                {},
                {"temperature": 0.4},
                {"temperature": 3.0, "top_k": 7},
                {"top_k": 10_000},
                {"top_p": 0.8},
                {"top_p": 0.05, "top_k": 20},
                {"typical_p": 0.6},
                {"typical_p": 0.2, "top_p": 0.9, "temperature": 0.7},
                {"repetition_penalty": 2.0, "top_k": 3, "min_new_tokens": 9},
            ]
        )
    ),
]
DETAILS = [
    ALL,
    NO_DETAILS,
    DetailParams(output=True, ranks=True),
    DetailParams(output=True, top_n=2),
    DetailParams(output=True, logprobs=True, top_n=1),
]


def logits_of(step: int, rows: int = len(PARAMS)) -> Tensor:
    """Scores with ties: of few different values in every third row."""
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(rows, VOCAB, generator=generator) * 3
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[1, 5:9] = -math.inf
    return logits


def states_of(details: Sequence[DetailParams]) -> list[SequenceState]:
    prompts = [[number, 2 * number, 17] for number in range(len(PARAMS))]
    rows = zip(PARAMS, details, prompts, strict=True)
    return [SequenceState(p, d if d.output else NO_DETAILS, ids, VOCAB) for p, d, ids in rows]


def details_for(step: int) -> list[DetailParams]:
    return [DETAILS[(i + step) % len(DETAILS)] for i in range(len(PARAMS))]


class TorchNoise:
    """The host's noise, as PyTorch's own generators make it."""

    def __init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(p.seed) for p in PARAMS if p.do_sample]

    def __call__(self, keys: Tensor, width: int) -> Tensor:
        assert keys[:, 0].tolist() == [p.seed for p in PARAMS if p.do_sample]
        return torch.stack(
            [torch.empty(width).exponential_(1, generator=g) for g in self.generators]
        )


def same(found: TokenDetails | None, expected: TokenDetails | None) -> None:
    if found is None or expected is None:
        assert found == expected
        return
    assert found.rank == expected.rank
    assert found.logprob == pytest.approx(expected.logprob, abs=2e-5, nan_ok=True)
    assert sorted(i for i, _ in found.top) == sorted(i for i, _ in expected.top)
    for (_, one), (_, other) in zip(found.top, expected.top, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize("offset", range(len(DETAILS)))
def test_the_host_would_choose_the_same(offset: int) -> None:
    """Twelve tokens of all kinds of sequences together, with the host's noise handed in."""
    details, noise = details_for(offset), TorchNoise()
    states, sampler = states_of(details), Sampler(VOCAB, EOS)
    for i, (params, wanted) in enumerate(zip(PARAMS, details, strict=True)):
        sampler.add(i, params, wanted, [i, 2 * i, 17])
    for step in range(12):
        expected = sampler.sample(range(len(PARAMS)), logits_of(step))
        picked = device.pick(logits_of(step), states, EOS, noise)
        fetched = device.fetch(picked, [state.details for state in states])
        for state, one, other in zip(states, fetched, expected, strict=True):
            assert one is not None
            assert one[0] == other.token_id
            same(one[1] if state.details.output else None, other.details)
            state.advance(one[0])


def test_rows_without_a_finite_maximum_fail_alone() -> None:
    logits = logits_of(0)
    logits[0, 7] = math.nan
    logits[3] = -math.inf
    logits[5, 2] = math.inf
    logits[6] = math.nan
    choices = choose_on_device(states_of(details_for(0)), logits, EOS)
    assert [i for i, choice in enumerate(choices) if choice.error] == [0, 3, 5, 6]
    alone = choose_on_device(states_of(details_for(0)), logits_of(0), EOS)
    good = [i for i in range(len(choices)) if i not in (0, 3, 5, 6)]
    assert [choices[i] for i in good] == [alone[i] for i in good]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    states, logits = states_of(details_for(2)), logits_of(4)
    together = choose_on_device(states, logits.clone(), EOS)
    order = torch.randperm(len(states)).tolist()
    shuffled = choose_on_device([states[i] for i in order], logits[order], EOS)
    for place, i in enumerate(order):
        assert shuffled[place].token_id == together[i].token_id
        (alone,) = choose_on_device([states[i]], logits[i : i + 1].clone(), EOS)
        assert alone.token_id == together[i].token_id


def drawn(seed: int, count: int, step: int = 0) -> Tensor:
    keys = torch.tensor([[seed + i, step] for i in range(count)])
    return device.hashed_noise(keys, VOCAB)


def test_noise_is_exponential_and_independent() -> None:
    noise = drawn(10, 2000).double()
    assert (noise > 0).all()
    assert noise.mean() == pytest.approx(1.0, abs=0.01)
    assert noise.var() == pytest.approx(1.0, abs=0.03)
    ordered = noise.flatten().sort().values
    expected = 1 - (-ordered).exp()
    ranks = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (ranks - expected).abs().max() < 2.0 / math.sqrt(len(ordered))  # Kolmogorov-Smirnov
    for other in (drawn(11, 2000).double(), drawn(10, 2000, step=1).double()):
        pairs = torch.stack([noise.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.006
    assert torch.equal(drawn(10, 3), drawn(10, 3))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63, 2**64 - 1])
def test_every_seed_is_its_own(seed: int) -> None:
    params = SamplingParams(do_sample=True, seed=seed)
    state = SequenceState(params, NO_DETAILS, [], VOCAB)
    picks = {choose_on_device([state], torch.zeros(1, VOCAB), EOS)[0].token_id for _ in range(3)}
    assert len(picks) == 1


def test_sampled_tokens_have_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, -math.inf]])
    probs, count = logits.softmax(-1)[0], 4000
    states = [
        SequenceState(SamplingParams(do_sample=True, seed=seed), NO_DETAILS, [], 5)
        for seed in range(count)
    ]
    tokens = device.pick(logits.repeat(count, 1), states, ()).tokens
    seen = tokens.bincount(minlength=5).double()
    assert seen[4] == 0
    expected = probs[:4].double() * count
    assert ((seen[:4] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees, 0.1 %


@pytest.mark.parametrize("wanted", [d for d in DETAILS if d is not NO_DETAILS])
def test_details_of_inputs(wanted: DetailParams) -> None:
    logits = logits_of(9)
    ids = [(7 * i) % VOCAB for i in range(len(logits))]
    expected = input_details(logits.clone(), ids, wanted)
    for found, other in zip(device.details_of(logits, ids, wanted), expected, strict=True):
        same(found, other)


def test_nothing_is_waited_for() -> None:
    """Without data there is nothing that a hidden read could return: it would raise."""
    picked = device.pick(logits_of(0).to("meta"), states_of(details_for(0)), EOS)
    assert picked.tokens.shape == (len(PARAMS),)
    assert picked.details.shape == (len(PARAMS), 2 + 2 * 16)
    with pytest.raises(RuntimeError, match="meta"):
        device.fetch(picked, details_for(0))


def test_logits_elsewhere_are_sampled_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def choose(states: object, logits: Tensor, eos: object) -> list[Choice]:
        asked.append(logits.device)
        return [Choice(7)]

    monkeypatch.setattr("tgis.sampling.sampler.choose_on_device", choose)
    sampler = Sampler(VOCAB, EOS)
    sampler.add(1, SamplingParams(), NO_DETAILS, [1])
    assert sampler.sample([1], torch.zeros(1, VOCAB, device="meta")) == [Choice(7)]
    assert asked == [torch.device("meta")]
