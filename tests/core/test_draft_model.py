"""A draft model is kept in step with what sequences become, and never disturbs them."""

import pytest
import torch
from tests.kit.fake_engine import VOCAB, FakeEngine, continuation
from tests.kit.scheduling import request

from tgis.core.draft_model import CATCH_UP_TOKENS, DraftModel
from tgis.core.sequence import Sequence
from tgis.engines.base import CacheShape
from tgis.engines.plan import StepPlan

SHAPE = CacheShape(2, 600)


def make(shape: CacheShape = SHAPE) -> tuple[DraftModel, FakeEngine]:
    engine = FakeEngine()
    engine.allocate(shape)
    return DraftModel(engine, shape, VOCAB, 0.5), engine


def sequence(uid: int, ids: list[int]) -> Sequence:
    return Sequence.of(uid, request(uid, prompt=ids, max_new=500), 0)


def test_it_drafts_what_it_would_generate() -> None:
    model, _ = make()
    first, second = sequence(1, [3, 1, 4]), sequence(2, [1, 5])
    drafts = model.draft([(first, 3), (second, 5)])
    assert drafts == [continuation([3, 1, 4], 3), continuation([1, 5], 5)]
    assert model.seconds(4) == 2.0


@pytest.mark.parametrize("num_right", range(5))
def test_it_goes_on_where_it_was_right(num_right: int) -> None:
    model, engine = make()
    seq = sequence(1, [3, 1, 4])
    (draft,) = model.draft([(seq, 4)])
    wrong = (continuation([3, 1, 4, *draft[:num_right]], 1)[0] + 1) % VOCAB
    seq.token_ids += [*draft[:num_right], wrong]
    engine.plans.clear()
    assert model.draft([(seq, 2)]) == [continuation(seq.token_ids, 2)]
    (row,) = engine.plans[0].rows
    # The last guess had not been computed itself.
    assert row.start == 3 + min(num_right, 3)
    assert row.token_ids == seq.token_ids[row.start :]


def test_a_long_prompt_is_read_over_several_steps() -> None:
    model, engine = make()
    ids = [number % VOCAB for number in range(2 * CATCH_UP_TOKENS + 9)]
    seq = sequence(1, ids)
    assert model.draft([(seq, 2)]) == [[]]
    assert model.draft([(seq, 2)]) == [[]]
    assert model.draft([(seq, 2)]) == [continuation(ids, 2)]
    assert [plan.num_tokens for plan in engine.plans] == [CATCH_UP_TOKENS, CATCH_UP_TOKENS, 9, 1]


def test_who_waits_no_longer_gives_up_its_place() -> None:
    model, engine = make()
    seqs = [sequence(uid, [uid, 2, 3]) for uid in (1, 2, 3)]
    model.draft([(seqs[0], 2), (seqs[1], 2)])
    assert model.draft([(seqs[1], 2), (seqs[2], 2)]) == [
        continuation(seq.token_ids, 2) for seq in seqs[1:]
    ]
    assert model.draft([(seqs[0], 2)]) == [continuation([1, 2, 3], 2)]
    for uid in (1, 2, 3, 4):
        model.forget(uid)
    assert sorted(model._free) == [0, 1]
    assert not any(engine.cache.slots)


def test_sequences_too_long_for_it_get_nothing() -> None:
    model, _ = make(CacheShape(2, 8))
    assert model.draft([(sequence(1, [1] * 7), 2), (sequence(2, [1] * 6), 2)]) == [
        [],
        continuation([1] * 6, 2),
    ]


def test_tokens_that_it_does_not_know_get_nothing() -> None:
    model, _ = make()
    assert model.draft([(sequence(1, [1, VOCAB, 2]), 2)]) == [[]]


def test_a_model_that_fails_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    model, engine = make()

    def fail(plan: StepPlan) -> None:
        raise torch.OutOfMemoryError("too much")

    engine.before_forward = fail
    assert model.draft([(sequence(1, [1]), 2)]) == [[]]
    assert "no drafts from now on" in caplog.text
    engine.before_forward = None
    assert model.draft([(sequence(1, [1]), 2)]) == [[]]
    assert not engine.plans
