"""The Transformers engine: every model gives in batches what Transformers gives it alone."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engines.hf_models import (
    CONFIGS,
    START,
    VOCAB,
    Sequences,
    generate,
    load_engine,
    random_ids,
    save_model,
)

from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ConfigError

pytestmark = pytest.mark.usefixtures("single_thread")

STEPS = 40
TOLERANCE = 1e-4
BATCHING = dict.fromkeys(CONFIGS, "padded") | {"rwkv": "single"}


class Loaded(NamedTuple):
    name: str
    model: Any  # as Transformers has it
    engine: Any

    def sequences(self) -> Sequences:
        return Sequences(self.engine, self.model.config.is_encoder_decoder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models by name, made when first asked for."""
    made: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = save_model(path, CONFIGS[name])
            made[name] = Loaded(name, model, load_engine(path))
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_that_join_and_leave_are_what_transformers_generates(
    models: Any, name: str
) -> None:
    loaded = models(name)
    assert loaded.engine._batching == BATCHING[name]
    joins = {0: (0, 3), 1: (0, 17), 2: (5, 9), 3: (12, 1)}  # slot -> step, length of the prompt
    counts = {0: STEPS, 1: 14, 2: STEPS, 3: 30}
    sequences = loaded.sequences()
    step, running = 0, set[int]()
    while step == 0 or running:
        for slot, (start, length) in joins.items():
            if start == step:
                sequences.add(slot, random_ids(slot, length))
                running.add(slot)
        sequences.step(sorted(running))
        for slot in sorted(running):
            if len(sequences.logits[slot]) == counts[slot]:
                loaded.engine.release([slot])
                running.remove(slot)
        step += 1
    for slot, (_, length) in joins.items():
        tokens, logits = generate(loaded.model, random_ids(slot, length), counts[slot])
        assert sequences.tokens[slot][-counts[slot] :] == tokens
        got = torch.stack(sequences.logits[slot])
        torch.testing.assert_close(got, logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "t5", "bart", "rwkv"])
def test_logits_of_every_position(models: Any, name: str) -> None:
    loaded = models(name)
    prompts = [list(random_ids(20 + number, length)) for number, length in enumerate((4, 13, 7))]
    is_seq2seq = loaded.model.config.is_encoder_decoder
    encoder_ids = [list(random_ids(30, 8)) if is_seq2seq else None] * 3
    wants = [Want.ALL, Want.LAST, Want.ALL]
    rows = [
        Row(slot, slot, ids, 0, want, encoder_ids=read)
        for slot, (ids, want, read) in enumerate(zip(prompts, wants, encoder_ids, strict=True))
    ]
    logits = loaded.engine.forward(StepPlan(rows))
    expected = []
    for row in rows:
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            if is_seq2seq:
                whole = loaded.model(torch.tensor([row.encoder_ids]), decoder_input_ids=ids)
            else:
                whole = loaded.model(ids)
        expected.append(whole.logits[0] if row.want is Want.ALL else whole.logits[0, -1:])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=TOLERANCE)
    loaded.engine.release([0, 1, 2])


@pytest.mark.parametrize(
    "name", ["mistral", "bloom", "qwen3_next", "t5", "bart", "m2m_100", "rwkv"]
)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_a_row_is_the_same_in_any_company(models: Any, name: str, seed: int) -> None:
    """Rows join, leave, are left out of steps, are preempted: at random."""
    check_any_company(models(name), seed)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_equal_length_share_passes_where_others_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("tgis.engines.hf.number_tokens", lambda _: None)
    model = save_model(tmp_path, CONFIGS["bart"])
    loaded = Loaded("bart", model, load_engine(tmp_path))
    assert loaded.engine._batching == "aligned"
    check_any_company(loaded, seed)


def check_any_company(loaded: Loaded, seed: int) -> None:
    rng = random.Random(seed)
    sequences = loaded.sequences()
    alone: dict[tuple[int, int], list[int]] = {}
    prompts: dict[int, tuple[int, int]] = {}
    for _ in range(18):
        for slot in list(prompts):
            if rng.random() < 0.1:
                sequences.preempt(slot)
            elif rng.random() < 0.1:
                sequences.remove(slot)
                del prompts[slot]
        free = [slot for slot in range(4) if slot not in prompts]
        if free and (not prompts or rng.random() < 0.5):
            slot = rng.choice(free)
            prompts[slot] = (rng.randrange(3), rng.randrange(1, 12))
            sequences.add(slot, random_ids(*prompts[slot]))
        chosen = [slot for slot in prompts if rng.random() < 0.8]
        rng.shuffle(chosen)
        if chosen:
            sequences.step(chosen)
    for slot, prompt in prompts.items():
        if prompt not in alone:
            alone[prompt] = generate(loaded.model, random_ids(*prompt), 18)[0]
        count = len(sequences.logits[slot])
        assert sequences.tokens[slot][-count:] == alone[prompt][:count] or not count
    for slot in prompts:
        loaded.engine.release([slot])


@pytest.mark.parametrize("name", ["mistral", "qwen3_next", "t5", "rwkv"])
def test_a_step_that_fails_can_be_tried_again(
    models: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models(name)
    sequences = loaded.sequences()
    for slot in range(3):
        sequences.add(slot, random_ids(slot, 4 + 3 * slot))
    for _ in range(8):
        sequences.step(range(3))
    sequences.add(3, random_ids(3, 5))
    plan = StepPlan([sequences.row(slot) for slot in range(4)])
    network = loaded.engine._network._model
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-2]
    calls: list[object] = []

    def fail(*call: object) -> None:
        calls.append(call)
        if len(calls) == 2:  # what is new has been computed, and most of what goes on
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="you tried"):
        loaded.engine.forward(plan)
    hook.remove()
    sequences.step([2, 3])
    sequences.step([3, 1, 0])
    for _ in range(6):
        sequences.step(range(4))
    for slot, length in ((0, 4), (1, 7), (2, 10), (3, 5)):
        count = len(sequences.logits[slot])
        tokens, _ = generate(loaded.model, random_ids(slot, length), count)
        assert sequences.tokens[slot][-count:] == tokens
    loaded.engine.release(range(4))


def test_a_row_must_continue_what_its_slot_holds(models: Any) -> None:
    engine = models("gpt2").engine
    engine.forward(StepPlan([Row(0, 0, [5, 6, 7], 0, Want.LAST)]))
    for row, held in (
        (Row(0, 0, [8], 2, Want.LAST), 3),
        (Row(1, 1, [8], 2, Want.LAST), 0),
        (Row(0, 0, [8, 9], 3, Want.LAST), 3),
    ):
        with pytest.raises(ValueError, match=rf"slot {row.slot} holds {held} tokens"):
            engine.forward(StepPlan([row]))
    engine.release([0])


def test_caps(models: Any) -> None:
    caps = models("gpt2").engine.caps
    assert (caps.name, caps.kv_layout, caps.chunked_prefill) == ("hf_transformers", "padded", False)
    assert (caps.vocab_size, caps.dtype) == (VOCAB, "float32")
    assert caps.kv_bytes_per_token == 2 * 3 * 48 * 4
    limits = dict.fromkeys(("gpt2", "opt", "gpt_neo", "gptj", "bart", "pegasus"), 128)
    limits |= {"mistral": None, "bloom": None, "t5": None, "m2m_100": None}  # computed
    assert {name: models(name).engine.caps.max_positions for name in limits} == limits
    assert models("bart").engine.caps.kv_bytes_per_token >= 2 * 2 * 2 * 48 * 4


def test_sequences_longer_than_the_positions(models: Any) -> None:
    engine = models("gpt2").engine
    engine.allocate(CacheShape(4, 128))
    with pytest.raises(ConfigError, match="129 tokens are longer than the model's 128 positions"):
        engine.allocate(CacheShape(4, 129))


def test_closing_frees_the_cache(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["t5"])
    engine = load_engine(tmp_path)
    engine.forward(StepPlan([Row(0, 0, [START], 0, Want.LAST, encoder_ids=[3, 4])]))
    engine.close()
    with pytest.raises(ValueError, match="slot 0 holds 0 tokens"):
        engine.forward(StepPlan([Row(0, 0, [5], 1, Want.LAST)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_model(tmp_path, CONFIGS["mistral"])
    engine = load_engine(tmp_path, dtype)
    assert engine._batching == "padded"
    ids = list(random_ids(1, 9))
    logits = engine.forward(StepPlan([Row(0, 0, ids, 0, Want.LAST)]))
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = model.to(dtype)(torch.tensor([ids])).logits[0, -1:].float()
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * scale)
