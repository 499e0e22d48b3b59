"""The arithmetic of admission against a token-by-token simulation of the batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgis.core.budget import (
    Load,
    PaddedBudget,
    PaddedModel,
    PagedBudget,
    Verdict,
)
from tgis.errors import ConfigError

loads = st.lists(st.builds(Load, st.integers(1, 60), st.integers(0, 60)), max_size=8)
load = st.builds(Load, st.integers(1, 60), st.integers(0, 60))


def most_tokens(batch: list[Load], until: int, padded: bool) -> int:
    """Generate one token per sequence and step; a sequence leaves once it has no more to come."""
    most = 0
    for now in range(until + 1):
        alive = [tokens for tokens, remaining in batch if remaining >= now]
        size = (max(alive) + now) * len(alive) if padded else sum(alive) + now * len(alive)
        most = max(most, size)
    return most


@given(loads, loads, load, st.integers(1, 600))
def test_paged_exactly_what_fits(
    running: list[Load], chosen: list[Load], new: Load, limit: int
) -> None:
    room = PagedBudget(limit).room(running)
    for item in chosen:
        room.add(item)
    batch = [*running, *chosen, new]
    fits = most_tokens(batch, new.remaining, padded=False) <= limit
    fits &= sum(tokens for tokens, _ in running) < limit
    verdict = room.fits(new)
    assert verdict.fits == fits
    coarse = sum(tokens + remaining for tokens, remaining in batch) <= limit
    if fits:
        assert verdict is (Verdict.FITS if coarse else Verdict.FITS_EXACTLY)


@given(loads, loads, load, st.integers(1, 600))
def test_padded_never_less_than_what_is_needed(
    running: list[Load], chosen: list[Load], new: Load, limit: int
) -> None:
    room = PaddedBudget(PaddedModel(limit, gradient=1.0), max_prefill_padding=1.0).room(running)
    for item in chosen:
        room.add(item)
    batch = [*running, *chosen, new]
    needed = most_tokens(batch, new.remaining, padded=True)
    verdict = room.fits(new)
    if verdict.fits:
        # At a shared end the reference counts those that are listed so far, in order of length.
        assert needed <= limit
    if verdict is Verdict.NO_ROOM:
        longest = max(tokens for tokens, _ in batch)
        worst = (longest + max(remaining for _, remaining in batch)) * len(batch)
        assert worst > limit or max((t for t, _ in running), default=0) * len(running) >= limit


def test_looking_ahead_less_admits_more() -> None:
    running = [Load(10, 1000)] * 4
    assert PagedBudget(500).room(running).fits(Load(10, 1000)) is Verdict.NO_ROOM
    assert PagedBudget(500, horizon=90).room(running).fits(Load(10, 1000)) is Verdict.FITS
    assert PagedBudget(500, horizon=91).room(running).fits(Load(10, 1000)) is Verdict.NO_ROOM


def test_the_weights_of_the_new_prompts() -> None:
    room = PagedBudget(100, gradient=0.5, prefill_gradient=2.0).room([Load(40, 1)])
    assert room.fits(Load(40, 1)) is Verdict.FITS  # 80 <= 100 - 20
    assert room.fits(Load(41, 1)) is Verdict.PREFILL_WEIGHT
    room.add(Load(30, 1))
    assert room.fits(Load(11, 1)) is Verdict.PREFILL_WEIGHT


def test_prefill_of_padded_batches_is_linear_or_quadratic() -> None:
    model = PaddedModel(1000, linear=1.0, quadratic=(0.5, 0.1), gradient=0.0)
    budget = PaddedBudget(model, max_prefill_padding=1.0)
    assert budget.prefill_weight(3, 4) == 12  # max(12, 6 + 4.8)
    assert budget.prefill_weight(2, 40) == 360  # max(80, 40 + 320)
    room = budget.room([])
    room.add(Load(40, 5))
    room.add(Load(40, 5))
    assert room.fits(Load(60, 5)) is Verdict.PREFILL_WEIGHT  # 3 x 60: 90 + 1080
    assert room.fits(Load(50, 5)) is Verdict.FITS  # 3 x 50: 75 + 750


def test_padding_of_the_new_prompts_only() -> None:
    room = PaddedBudget(PaddedModel(), max_prefill_padding=0.2).room([Load(1000, 50)])
    assert room.fits(Load(10, 5)) is Verdict.FITS
    room.add(Load(10, 5))
    assert room.fits(Load(7, 5)) is Verdict.FITS  # 3 of 20
    assert room.fits(Load(5, 5)) is Verdict.PREFILL_PADDING  # 5 of 20
    room.add(Load(10, 5))
    assert room.fits(Load(5, 5)) is Verdict.FITS  # 5 of 30


@pytest.mark.parametrize(
    ("num_running", "remaining", "num_waiting", "num_steps", "may"),
    [
        (0, 0, 1, 0, True),
        (1, 9, 1, 1, True),
        (8, 9, 7, 1, True),  # 8 x 23 // 24 = 7
        (8, 9, 6, 1, False),
        (8, 9, 4, 12, True),
        (8, 9, 3, 12, False),
        (8, 9, 1, 23, True),
        (8, 9, 1, 24, True),
        (8, 1, 9, 24, False),  # about to end
    ],
)
def test_padded_batches_are_interrupted_less_the_less_wait(
    num_running: int, remaining: int, num_waiting: int, num_steps: int, may: bool
) -> None:
    running = [Load(5, remaining)] * num_running
    budget = PaddedBudget(PaddedModel(), max_waiting_tokens=24)
    assert budget.may_add(running, num_waiting, num_steps) is may
    assert PagedBudget(100).may_add(running, num_waiting, num_steps)


@pytest.mark.parametrize("margin", [0, 20, 99])
@pytest.mark.parametrize("batch", [1, 12])
def test_manual_estimation_keeps_the_margin_once_and_one_full_length_always_fits(
    margin: int, batch: int
) -> None:
    model = PaddedModel.manual(512, batch, margin)
    assert model.limit == max(512, 512 * batch * (100 - margin) // 100)
    budget = PaddedBudget(model)
    budget.check_length(512)
    assert budget.room([]).fits(Load(511, 1)).fits
    assert budget.room([]).fits(Load(1, 511)).fits


def test_a_sequence_length_that_does_not_fit_is_refused_with_tgis_texts() -> None:
    with pytest.raises(ConfigError) as paged:
        PagedBudget(100, gradient=2.0).check_length(51)
    assert str(paged.value) == (
        "The provided max_sequence length (51) results in a next-token batch weight "
        "that exceeds the estimated capacity (100)"
    )
    with pytest.raises(ConfigError, match=r"\(51\) results in a prefill batch weight"):
        PaddedBudget(PaddedModel(100, linear=2.0)).check_length(51)
    PaddedBudget(PaddedModel()).check_length(10**9)


def test_tokens_of_a_batch() -> None:
    assert PagedBudget(math.inf).batch_tokens([3, 9, 4]) == 16
    assert PaddedBudget(PaddedModel()).batch_tokens([3, 9, 4]) == 27
    assert PaddedBudget(PaddedModel()).batch_tokens([]) == 0
