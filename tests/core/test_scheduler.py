"""The scheduler's rules, one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.fake_engine import FakeCache, continuation
from tests.kit.scheduling import Driver, request

from tgis.core.budget import PaddedBudget, PaddedModel
from tgis.core.kv.rows import RowsMemory
from tgis.core.scheduler import OVERTAKING_SECONDS, Scheduler
from tgis.engines.base import CacheShape
from tgis.engines.plan import Want
from tgis.types import DetailParams, FinishReason
from tgis.wire import Add


def test_one_sequence_runs_to_its_limit() -> None:
    driver = Driver.make()
    add = request(1, prompt_len=4, max_new=5)
    driver.add(add)
    driver.run()
    assert driver.done[1] == (continuation(add.token_ids, 5), FinishReason.MAX_TOKENS)
    assert driver.memory.used == 0


def test_a_long_prompt_is_cut_into_chunks() -> None:
    driver = Driver.make(budget=16)
    driver.add(request(1, prompt_len=40, max_new=1))
    plans = [driver.step() for _ in range(3)]
    assert [len(plan.rows[0].token_ids) for plan in plans] == [16, 16, 8]
    assert [plan.rows[0].want for plan in plans] == [Want.NOTHING, Want.NOTHING, Want.LAST]
    assert [plan.rows[0].start for plan in plans] == [0, 16, 32]


def test_decoding_advances_in_every_step_beside_long_prompts() -> None:
    driver = Driver.make(budget=16, tokens=10_000)
    driver.add(request(1, prompt_len=2, max_new=100))
    driver.step()
    for seq_id in (2, 3, 4):
        driver.add(request(seq_id, prompt_len=200, max_new=2))
    for _ in range(30):
        plan = driver.step()
        assert plan.rows[0].seq_id == 1
        assert len(plan.rows[0].token_ids) == 1
        assert plan.num_tokens == 16


def test_input_details_want_all_logits() -> None:
    driver = Driver.make(budget=6)
    details = DetailParams(logprobs=True, input=True)
    seq = driver.add(request(1, prompt_len=10, max_new=3, details=details))
    assert driver.step().rows[0].want is Want.ALL
    seq.input_details = [None] * 9  # type: ignore[list-item]
    assert driver.step().rows[0].want is Want.LAST


def test_eos_ends_but_not_before_min_new_tokens() -> None:
    add = request(1, max_new=50)
    stream = continuation(add.token_ids, 50)
    first, eos = next((i, t) for i, t in enumerate(stream) if i and t in stream[i + 1 :])
    driver = Driver.make(eos=eos)
    driver.add(add)
    driver.run()
    assert driver.done[1] == (stream[: first + 1], FinishReason.EOS_TOKEN)

    second = stream.index(eos, first + 1)
    driver = Driver.make(eos=eos)
    driver.add(request(1, max_new=50, min_new=first + 2))
    driver.run()
    assert driver.done[1] == (stream[: second + 1], FinishReason.EOS_TOKEN)


def test_deadlines_while_running_and_while_waiting() -> None:
    driver = Driver.make(slots=1)
    driver.add(request(1, max_new=100, deadline=3.0))
    waiting = driver.add(request(2, deadline=2.0))
    while 1 in driver.live:
        driver.step()
        driver.expire()
    tokens, reason = driver.done[1]
    assert (len(tokens), reason) == (4, FinishReason.TIME_LIMIT)
    assert waiting.uid not in driver.live
    assert waiting.num_generated == 0
    assert not driver.scheduler.has_work


def test_deadlines_of_sequences_that_have_ended_are_forgotten() -> None:
    driver = Driver.make(slots=4)
    late = driver.add(request(0, max_new=400, deadline=1e9))
    for number in range(1, 300):
        driver.add(request(number, max_new=1, deadline=1e9))
        driver.step()
    assert len(driver.scheduler._deadlines) < 200
    assert (late.deadline, late.uid) in driver.scheduler._deadlines
    driver.drop(0)
    assert not driver.scheduler._deadlines


def test_memory_runs_out_and_the_last_admitted_gives_way() -> None:
    driver = Driver.make(slots=3, tokens=90, budget=64)
    adds = [request(i, prompt_len=8, max_new=40) for i in range(3)]
    for add in adds:
        driver.add(add)
    driver.run()
    assert driver.scheduler.drain_counts().num_preempted > 0
    for add in adds:
        assert driver.done[add.seq_id][0] == continuation(add.token_ids, 40)


def test_a_small_request_passes_one_that_does_not_fit_for_a_while_only() -> None:
    driver = Driver.make(slots=4, tokens=100, budget=200)
    driver.add(request(1, prompt_len=60, max_new=30))
    driver.step()
    driver.add(request(2, prompt_len=80, max_new=1, arrival=10.0))
    driver.add(request(3, prompt_len=4, max_new=1, arrival=10.0 + OVERTAKING_SECONDS))
    driver.add(request(4, prompt_len=4, max_new=1, arrival=10.5 + OVERTAKING_SECONDS))
    driver.step()
    assert 3 in driver.done
    assert set(driver.live) == {1, 2, 4}
    driver.run()
    assert set(driver.done) == {1, 2, 3, 4}


def test_nothing_waits_for_ever_behind_endless_small_requests() -> None:
    driver = Driver.make(slots=4, tokens=100, budget=64)
    driver.add(request(0, prompt_len=4, max_new=4))
    driver.step()
    driver.add(request(1000, prompt_len=90, max_new=2, arrival=0.0))
    for i in range(1, 200):
        driver.add(request(i, prompt_len=6, max_new=8, arrival=float(i)))
        driver.step()
        if 1000 in driver.done:
            break
    assert 1000 in driver.done
    assert i < 30


def test_remove_in_every_state() -> None:
    driver = Driver.make(slots=2, budget=8)
    driver.add(request(1, prompt_len=20, max_new=5))
    driver.add(request(2, prompt_len=4, max_new=5))
    driver.add(request(3, prompt_len=4, max_new=5))
    driver.step()
    driver.drop(3)  # waiting
    driver.drop(1)  # in the middle of its prompt
    driver.step()
    driver.drop(2)  # decoding
    assert driver.memory.used == 0
    assert not driver.scheduler.has_work


def test_prompts_take_little_of_a_step_in_which_others_decode() -> None:
    driver = Driver.make(slots=4, budget=32, mixed=5)
    driver.add(request(1, prompt_len=40, max_new=30))
    assert [row.num_tokens for row in driver.step().rows] == [32]  # nobody waits for it
    driver.add(request(2, prompt_len=12, max_new=30))
    assert [row.num_tokens for row in driver.step().rows] == [8, 12]
    driver.add(request(3, prompt_len=12, max_new=30))
    for chunk in (5, 5, 2, 1):
        assert [row.num_tokens for row in driver.step().rows] == [1, 1, chunk]
    driver.run()
    assert set(driver.done) == {1, 2, 3}


def test_a_step_in_which_others_decode_is_a_small_one_but_half_of_it_is_for_prompts() -> None:
    driver = Driver.make(slots=8, budget=32, mixed_step=10)
    for number in range(1, 8):
        driver.add(request(number, prompt_len=4, max_new=30))
    assert [row.num_tokens for row in driver.step().rows] == [4] * 7  # nobody waits for it
    driver.add(request(8, prompt_len=12, max_new=30))
    assert [row.num_tokens for row in driver.step().rows] == [1] * 7 + [5]
    for number in range(1, 6):
        driver.drop(number)
    assert [row.num_tokens for row in driver.step().rows] == [1, 1, 7]
    driver.run()
    assert set(driver.done) == {6, 7, 8}


def test_a_budget_that_running_sequences_would_use_up_is_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens 4"):
        Driver.make(slots=4, budget=4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_interleaving_keeps_the_accounts_and_the_tokens(data: st.DataObject) -> None:
    driver = Driver.make(
        slots=data.draw(st.integers(1, 4)),
        tokens=data.draw(st.integers(40, 120)),
        budget=data.draw(st.integers(6, 40)),
        mixed=data.draw(st.none() | st.integers(1, 9)),
        mixed_step=data.draw(st.none() | st.integers(1, 20)),
    )
    adds: dict[int, Add] = {}
    for number in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["add", "step", "step", "drop"])):
            case "add":
                add = request(
                    number,
                    prompt_len=data.draw(st.integers(1, 20)),
                    max_new=data.draw(st.integers(1, 18)),
                    arrival=driver.now,
                )
                adds[number] = add
                driver.add(add)
            case "step":
                driver.step()
            case "drop" if driver.live:
                driver.drop(data.draw(st.sampled_from(sorted(driver.live))))
    driver.run()
    assert driver.memory.used == 0
    for seq_id, (tokens, reason) in driver.done.items():
        assert reason is FinishReason.MAX_TOKENS
        assert tokens == continuation(adds[seq_id].token_ids, adds[seq_id].max_new_tokens)


def padded(slots: int = 12, limit: int = 2000, patience: int = 24) -> Driver:
    budget = PaddedBudget(PaddedModel.tokens(limit, limit), max_waiting_tokens=patience)
    memory = RowsMemory(slots, slots * limit, caching=False)
    scheduler = Scheduler(
        memory, budget, max_step_tokens=slots * limit, max_running=slots, eos_token_ids=[]
    )
    return Driver(memory, scheduler, FakeCache(CacheShape(slots, limit)), slots * limit)


def test_padded_engines_get_whole_prompts_of_similar_length() -> None:
    driver = padded()
    for seq_id, length in enumerate((300, 290, 40, 310)):
        driver.add(request(seq_id, prompt_len=length, max_new=3))
    plan = driver.step()
    assert [(row.seq_id, len(row.token_ids)) for row in plan.rows] == [(0, 300), (1, 290), (3, 310)]
    counts = driver.scheduler.drain_counts()
    assert (counts.num_padding_skips, counts.num_queue_jumps) == (1, 1)
    driver.run()
    assert len(driver.done) == 4


def test_padded_batches_are_not_interrupted_for_every_single_request() -> None:
    driver = padded(patience=24)
    for seq_id in range(8):
        driver.add(request(seq_id, prompt_len=10, max_new=60))
    driver.step()
    driver.add(request(8, prompt_len=10, max_new=2))
    waited = 0
    while 8 in driver.live and driver.live[8].slot < 0:
        waited += 1
        driver.step()
    assert waited == 19  # 8 x (24 - 19) // 24 = 1
    assert driver.scheduler.num_running == 9


def test_weight_of_new_prompts_and_the_exact_test_are_counted() -> None:
    driver = Driver.make(slots=8, tokens=100, budget=200, horizon=float("inf"))
    driver.add(request(1, prompt_len=10, max_new=60))
    driver.add(request(2, prompt_len=25, max_new=10))  # 105 in all, but the first ends later
    driver.step()
    assert driver.scheduler.num_running == 2
    assert driver.scheduler.drain_counts().num_exact_fits == 1
