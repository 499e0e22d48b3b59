"""Details of input tokens, against the api's words; generated ones are tested with the sampler."""

import itertools

import pytest
import torch
from tests.sampling.twin import details_of

from tgis.sampling import input_details
from tgis.types import DetailParams, TokenDetails

GENERATOR = torch.Generator().manual_seed(0)
SHAPES = [
    DetailParams(logprobs=logprobs, ranks=ranks, top_n=top_n, input=True)
    for logprobs, ranks, top_n in itertools.product([True, False], [True, False], [0, 1, 5, 10, 64])
]


def same(ours: TokenDetails, theirs: TokenDetails) -> None:
    assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-5, abs=1e-5)
    assert ours.rank == theirs.rank
    assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
    assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("details", SHAPES)
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("vocab_size", [60, 4000])
def test_equals_the_api(details: DetailParams, coarse: bool, vocab_size: int) -> None:
    logits = torch.randn((12, vocab_size), generator=GENERATOR) * 3
    if coarse:  # ties: more candidates than asked, and the cap of four times as many
        logits = logits.round()
    next_ids = torch.randint(vocab_size, (12,), generator=GENERATOR).tolist()
    for ours, row, i in zip(
        input_details(logits, next_ids, details), logits, next_ids, strict=True
    ):
        same(ours, details_of(row, i, details, generated=False))


def test_cap_is_taken_in_id_order() -> None:
    """Of ten equals eight are shown: those of the lowest ids."""
    logits = torch.zeros((1, 10))
    (entry,) = input_details(logits, [9], DetailParams(ranks=True, top_n=2, logprobs=True))
    assert [i for i, _ in entry.top] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert entry.rank == 1


def test_without_logprobs_by_id() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0]])
    (entry,) = input_details(logits, [0], DetailParams(ranks=True, top_n=3))
    assert entry == TokenDetails(0.0, 4, ((1, 0.0), (2, 0.0), (3, 0.0)))


def test_minus_infinity_is_shown_for_input_only() -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 4] = 1.0
    wanted = DetailParams(logprobs=True, top_n=2, input=True)
    (entry,) = input_details(logits, [4], wanted)
    same(entry, details_of(logits[0], 4, wanted, generated=False))
    assert len(entry.top) == 6


def test_chunks_change_no_bit() -> None:
    wanted = DetailParams(logprobs=True, ranks=True, top_n=5, input=True)
    logits = torch.randn((31, 5000), generator=GENERATOR) * 5
    ids = list(range(31))
    whole = input_details(logits, ids, wanted)
    for size in (1, 2, 7, 30):
        parts = [
            entry
            for start in range(0, 31, size)
            for entry in input_details(
                logits[start : start + size], ids[start : start + size], wanted
            )
        ]
        assert parts == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_hostile_rows_raise_nothing_and_hurt_no_one(value: float) -> None:
    wanted = DetailParams(logprobs=True, ranks=True, top_n=5, input=True)
    logits = torch.randn((3, 4000), generator=GENERATOR)
    calm = input_details(logits, [1, 2, 3], wanted)
    logits[1] = value
    hostile = input_details(logits, [1, 2, 3], wanted)
    assert [hostile[0], hostile[2]] == [calm[0], calm[2]]
    assert hostile[1].logprob != hostile[1].logprob  # NaN
    logits[1, ::7] = 1.0
    assert len(input_details(logits, [1, 2, 3], wanted)) == 3


def test_no_tokens() -> None:
    assert input_details(torch.zeros((0, 5)), [], DetailParams(logprobs=True)) == []
