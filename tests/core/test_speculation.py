"""Drafts change no output, whatever is drafted and whatever happens meanwhile."""

import math
import random
from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.core_house import Front, House, open_house
from tests.kit.fake_engine import VOCAB, FakeEngine, continuation
from tests.kit.scheduling import Driver, request

from tgis.core.sequence import Sequence
from tgis.core.speculation import Account, Speculation, Turn
from tgis.core.step_costs import StepCosts
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want
from tgis.types import NO_DETAILS, FinishReason, SamplingParams
from tgis.wire import Abort, Add, DraftCounts

FREE = StepCosts([1], [0.0])


class Oracle:
    """Drafts what the fake engine will say, now and then with a mistake in it."""

    def __init__(self, seed: int = 0, wrong: float = 0.2) -> None:
        self._random = random.Random(seed)
        self._wrong = wrong
        self.forgotten: list[int] = []

    def draft(self, wanted: Ids[tuple[Sequence, int]]) -> list[list[int]]:
        drafts = [continuation(seq.token_ids, length) for seq, length in wanted]
        for draft in drafts:
            for i in range(len(draft)):
                if self._random.random() < self._wrong:
                    draft[i] = (draft[i] + 1) % VOCAB
        return drafts

    def seconds(self, num_tokens: int) -> float:
        return 0.0

    def forget(self, uid: int) -> None:
        self.forgotten.append(uid)


def speculation(seed: int = 0, wrong: float = 0.2, most: int = 6, rows: int = 16) -> Speculation:
    return Speculation(Oracle(seed, wrong), FREE, most, rows, 128)


def ask(seq_id: int, prompt: list[int], max_new: int, **sampling: Any) -> Add:
    return Add(seq_id, prompt, SamplingParams(**sampling), NO_DETAILS, max_new, math.inf, 0.0)


def counts(front: Front) -> DraftCounts:
    total = DraftCounts()
    for out in front.outs:
        if out.step is not None:
            total.num_drafts += out.step.drafts.num_drafts
            total.num_drafted += out.step.drafts.num_drafted
            total.num_accepted += out.step.drafts.num_accepted
    return total


def served(house: House, *adds: Add) -> Front:
    front = house.connect()
    for add in adds:
        front.send(add)
    house.turn(2)  # the connection, and then the words
    house.run(front)
    return front


def test_several_tokens_a_step(tmp_path: Path) -> None:
    with open_house(tmp_path, speculation=speculation(wrong=0.0)) as house:
        front = served(house, ask(1, [3, 1, 4], 30))
        assert front.tokens[1] == continuation([3, 1, 4], 30)
        assert front.finish == {1: FinishReason.MAX_TOKENS}
        assert len(house.engine.plans) < 10
        told = counts(front)
        assert told.num_accepted == told.num_drafted > 20
        assert not house.core._speculation._accounts


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_new", [1, 2, 3, 7, 20])
def test_never_more_than_was_asked_for(tmp_path: Path, wrong: float, max_new: int) -> None:
    with open_house(tmp_path, speculation=speculation(wrong=wrong)) as house:
        front = served(house, ask(1, [5, 6], max_new))
        assert front.tokens[1] == continuation([5, 6], max_new)
        positions = [
            row.start + len(row.token_ids) for plan in house.engine.plans for row in plan.rows
        ]
        assert max(positions) <= 2 + max_new - (max_new > 1)


def test_eos_inside_a_draft_ends_the_sequence(tmp_path: Path) -> None:
    tokens = continuation([9, 9], 40)
    eos = tokens[11]
    end = tokens.index(eos) + 1
    assert end > 4, "behind the first draft's begin"
    with open_house(tmp_path, speculation=speculation(wrong=0.0), eos=[eos]) as house:
        front = served(house, ask(1, [9, 9], 40), ask(2, [9, 9], 40, min_new_tokens=40))
        assert front.tokens[1] == tokens[:end]
        assert front.finish[1] is FinishReason.EOS_TOKEN
        assert eos not in front.tokens[2][:-1]
        assert len(front.tokens[2]) == 40


def test_the_deadline_ends_a_sequence_in_the_middle_of_a_draft(tmp_path: Path) -> None:
    with open_house(tmp_path, speculation=speculation(wrong=0.0)) as house:
        front = house.connect()
        add = Add(1, [1, 2], SamplingParams(), NO_DETAILS, 40, 4.5, 0.0)
        front.send(add)
        house.turn(2)
        house.run(front)
        assert front.finish == {1: FinishReason.TIME_LIMIT}
        tokens = front.tokens[1]
        assert tokens == continuation([1, 2], len(tokens))


def test_a_step_that_fails_is_tried_again_without_drafts(tmp_path: Path) -> None:
    def fail(plan: StepPlan) -> None:
        if any(row.num_drafts for row in plan.rows):
            raise MemoryError("no memory for drafts")

    with open_house(tmp_path, speculation=speculation()) as house:
        house.engine.before_forward = fail
        front = served(house, ask(1, [1, 2], 20), ask(2, [2], 20))
        assert front.tokens == {1: continuation([1, 2], 20), 2: continuation([2], 20)}
        assert not front.failed
        assert counts(front).num_drafts == 0
        steps = [out.step for out in front.outs if out.step]
        # Who has failed so is in debt, and waits before the next attempt.
        assert 1 <= sum(step.num_out_of_memory for step in steps) <= 2


def test_choosing_that_fails_among_others_comes_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_house(tmp_path, speculation=speculation(wrong=0.1)) as house:
        sampler, calls = house.core._sampler, [0]
        sample = sampler.sample

        def sometimes(seq_ids: Ids[int], logits: Any) -> Any:
            calls[0] += 1
            if len(seq_ids) > 1 and calls[0] % 3 == 0:
                raise MemoryError("now and then")
            return sample(seq_ids, logits)

        monkeypatch.setattr(sampler, "sample", sometimes)
        adds = [ask(i, [i, i + 1], 25) for i in range(1, 4)]
        front = served(house, *adds)
        assert front.tokens == {i: continuation([i, i + 1], 25) for i in range(1, 4)}


@pytest.mark.parametrize("layout", ["rows", "blocks"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_happens_the_tokens_are_those(
    tmp_path_factory: pytest.TempPathFactory, layout: str, data: st.DataObject
) -> None:
    """Little memory, prompts in chunks, prefixes, sequences that end anywhere or are cancelled."""
    draw = data.draw
    seed, wrong = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.1, 0.5]))
    tokens = draw(st.sampled_from([56, 64, 120]))
    lengths = st.tuples(st.integers(1, 20), st.integers(1, 25))
    asked = draw(st.lists(lengths, min_size=1, max_size=9))
    cancelled = draw(st.sets(st.integers(0, 8), max_size=2))
    stem = [number % 7 for number in range(20)]
    directory = tmp_path_factory.mktemp("house")
    with open_house(directory, 4, tokens, 24, speculation=speculation(seed, wrong)) as house:
        if layout == "blocks":
            _use_blocks(house, tokens)
        front = house.connect()
        for i, (length, max_new) in enumerate(asked):
            front.send(ask(i, stem[:length], max_new))
        house.turn(draw(st.integers(2, 6)))
        front.send(Abort(sorted(cancelled)))
        house.run(front)
        for i, (length, max_new) in enumerate(asked):
            expected = continuation(stem[:length], max_new)
            got = front.tokens.get(i, [])
            assert got == expected[: len(got)]
            if i not in cancelled:
                assert got == expected
                assert front.finish[i] is FinishReason.MAX_TOKENS
        assert not front.failed


def _use_blocks(house: House, tokens: int) -> None:
    """The same house with the other layout of memory."""
    driver = Driver.make(4, tokens, 24, block_tokens=4)
    engine = FakeEngine(kv_layout="blocks", block_tokens=4)
    engine.allocate(CacheShape(tokens // 4, 4))
    house.memory = driver.memory  # type: ignore[assignment]
    house.scheduler = driver.scheduler
    house.engine = house.core._engine = engine
    house.core._scheduler = driver.scheduler


def planned(num_rows: int, generated: int = 3) -> tuple[StepPlan, dict[int, Sequence], Driver]:
    """A step of rows that wait for their next token."""
    driver = Driver.make(slots=num_rows, tokens=1000, budget=num_rows + 8)
    for number in range(num_rows):
        driver.add(request(number, max_new=50))
    while len(driver.scheduler._running) < num_rows or any(
        seq.num_generated < generated for seq in driver.live.values()
    ):
        driver.step()
    sequences = {seq.uid: seq for seq in driver.live.values()}
    return driver.scheduler.schedule(), sequences, driver


def lengths_of(plan: StepPlan) -> list[int]:
    return [row.num_drafts for row in plan.rows]


def test_drafts_fill_what_prompts_leave_of_a_step() -> None:
    plan, sequences, driver = planned(3)
    speculation(wrong=0.0, most=6).extend(plan, sequences, driver.scheduler)
    assert lengths_of(plan) == [4, 4, 0]
    assert plan.num_tokens == 3 + 8
    assert plan.num_logits == 5 + 5 + 1
    row = plan.rows[0]
    assert row.want is Want.ALL
    assert row.token_ids == [
        sequences[row.seq_id].token_ids[-1],
        *continuation(sequences[row.seq_id].token_ids, 4),
    ]


def test_no_drafts_in_large_steps() -> None:
    plan, sequences, driver = planned(3)
    prompt = Row(99, 9, list(range(120)), 0, Want.LAST)
    plan.rows.append(prompt)
    driver.scheduler._max_step_tokens = 1000
    speculation(wrong=0.0).extend(plan, sequences, driver.scheduler)
    assert lengths_of(plan) == [4, 1, 0, 0]
    plan.rows[-1].token_ids += [1] * 6
    for row in plan.rows:
        row.drop_drafts()
    speculation(wrong=0.0).extend(plan, sequences, driver.scheduler)
    assert lengths_of(plan) == [0, 0, 0, 0]


def test_no_drafts_for_large_batches() -> None:
    plan, sequences, driver = planned(3)
    speculation(rows=2).extend(plan, sequences, driver.scheduler)
    assert lengths_of(plan) == [0, 0, 0]


def test_no_drafts_where_they_cost_more_than_they_can_give() -> None:
    plan, sequences, driver = planned(2)
    dear = Speculation(Oracle(wrong=0.0), StepCosts([1, 2, 100], [1.0, 1.0, 300.0]), 6, 16, 128)
    dear.extend(plan, sequences, driver.scheduler)
    assert lengths_of(plan) == [0, 0]


def test_a_draft_that_cannot_be_made_in_time_is_not_made() -> None:
    class Slow(Oracle):
        def seconds(self, num_tokens: int) -> float:
            return 2.0 * num_tokens

    plan, sequences, driver = planned(1)
    costs = StepCosts([1, 2], [1.0, 1.0])
    Speculation(Slow(), costs, 6, 16, 128).extend(plan, sequences, driver.scheduler)
    assert lengths_of(plan) == [0]


def test_what_is_always_wrong_costs_little() -> None:
    """At most the account's rate, in tokens' time, however long it goes on."""
    account, lost, tokens = Account(8, 1), 0.0, 3000
    for number in range(1, tokens):
        if length := account.length(number):
            cost = 0.1 * length
            account.note(length, 0, cost)
            lost += cost
    assert 0.015 * tokens < lost < 0.025 * tokens


def test_what_is_right_gets_longer_and_what_is_wrong_shorter() -> None:
    account = Account(12, 0)
    seen = []
    for number, right in enumerate([True, True, True, False, True, True]):
        length = account.length(100 * number)
        seen.append(length)
        account.note(length, length if right else 1, 0.1)
    assert seen == [4, 8, 12, 12, 2, 4]


def test_a_turn_goes_on_as_long_as_drafts_are_right() -> None:
    turn = Turn(Sequence.of(1, request(1), 0), 7, [4, 5, 6])
    assert turn.accepts(4)
    assert turn.accepts(5)
    assert turn.pick == 9
    assert not turn.accepts(9)
    assert (turn.accepted, turn.pick) == (2, 9)


def test_a_row_without_its_drafts() -> None:
    row = Row(1, 0, [7, 8, 9], 4, Want.ALL, num_drafts=2)
    row.drop_drafts()
    row.drop_drafts()
    assert (row.token_ids, row.want, row.num_drafts) == ([7], Want.LAST, 0)
