"""Soft prompts in every engine: what `transformers` computes from embeddings spliced by hand."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.engines import hf_models
from tests.engines import test_native_seq2seq as t5
from tests.engines.test_ranks import eight_heads
from tests.kit.ranks import Ranks, connected
from tests.models import twins
from torch import Tensor

from tgis.adapters.packed import pack, unpack
from tgis.adapters.prompts import SoftPrompt
from tgis.engines import native, native_seq2seq
from tgis.engines.base import CacheShape, Engine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.hub.resolve import read_json

Forward = Callable[[StepPlan], Tensor]
STEPS = 6
PROMPT, PLAIN = 7, 3  # handles; the second has an encoder's part only
FAMILIES = (
    "llama",
    "qwen2",
    "granite",
    "gemma",
    "gpt_neox",
    "bloom",
    "falcon-7b",
    "gpt_bigcode",
    "gpt2",
    "mpt",
    "opt",
)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def embeddings(model: Any, length: int, seed: int) -> Tensor:
    """Rows that differ from every token's, of the size that the model's own have."""
    own = model.get_input_embeddings().weight
    noise = torch.randn(length, own.shape[1], generator=torch.Generator().manual_seed(seed))
    return noise * own.std()


@torch.no_grad()
def decoder_logits(model: Any, prompt: Tensor | None, ids: list[int]) -> Tensor:
    """After every real token, by hand."""
    table = model.get_input_embeddings()
    own = table(torch.tensor(ids))
    spliced = own if prompt is None else torch.cat([prompt, own])
    logits: Tensor = model(inputs_embeds=spliced[None]).logits[0].float()
    return logits[len(spliced) - len(ids) :]


@torch.no_grad()
def seq2seq_logits(
    model: Any, prompt: SoftPrompt | None, source: list[int], target: list[int]
) -> Tensor:
    """After every real token of the target, by hand."""
    table = model.get_input_embeddings()
    parts = [table(torch.tensor(source)), table(torch.tensor(target))]
    if prompt is not None and prompt.encoder is not None:
        parts[0] = torch.cat([prompt.encoder, parts[0]])
    if prompt is not None and prompt.decoder is not None:
        parts[1] = torch.cat([prompt.decoder, parts[1]])
    out = model(inputs_embeds=parts[0][None], decoder_inputs_embeds=parts[1][None])
    logits: Tensor = out.logits[0].float()
    return logits[-len(target) :]


def check_decoder(model: Any, forward: Forward, prompt: Tensor, chunk: int | None) -> None:
    """A sequence with a prompt, a longer one without and one that joins later, in one batch."""
    length = len(prompt)
    prefix = [0] * length
    ids = {0: twins.random_ids(1, 5), 1: twins.random_ids(2, 14), 2: twins.random_ids(3, 2)}
    handles = {0: PROMPT, 1: 0, 2: PROMPT}
    running: dict[int, int] = {}  # slot -> positions computed
    for step in range(STEPS):
        rows = []
        for slot in (0, 1) if step < 2 else (0, 1, 2):
            whole = (prefix if handles[slot] else []) + ids[slot]
            start = running.get(slot, 0)
            end = min(len(whole), start + chunk) if chunk else len(whole)
            want = Want.LAST if end == len(whole) else Want.NOTHING
            rows.append(Row(slot, slot, whole[start:end], start, want, prompt=handles[slot]))
            running[slot] = end
        logits = iter(forward(StepPlan(rows)))
        for row in rows:
            if row.want is Want.LAST:
                own = prompt if handles[row.slot] else None
                expected = decoder_logits(model, own, ids[row.slot])[-1]
                found = next(logits)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
                assert found.argmax() == expected.argmax()
                ids[row.slot].append(int(expected.argmax()) % 77)
    assert len(ids[0]) > 5
    assert len(ids[1]) > 14


def check_seq2seq(
    model: Any, forward: Forward, prompts: dict[int, SoftPrompt], start_id: int
) -> None:
    """Sequences with both parts of a prompt, with one of them and with none, in one batch."""
    sources = {
        slot: list(ids) for slot, ids in enumerate([[5, 9, 1], [7, 3, 4, 8, 2, 6, 1], [4, 1]])
    }
    handles = {0: PROMPT, 1: 0, 2: PLAIN}
    targets = {slot: [start_id] for slot in sources}
    for step in range(STEPS):
        rows = []
        for slot, target in targets.items():
            prompt = prompts.get(handles[slot], SoftPrompt(None))
            if step == 0:
                ids = [0] * prompt.num_decoder + target
                source = [0] * prompt.num_encoder + sources[slot]
                row = Row(slot, slot, ids, 0, Want.LAST, [], source, handles[slot])
            else:
                place = prompt.num_decoder + len(target) - 1
                row = Row(slot, slot, [target[-1]], place, Want.LAST, prompt=handles[slot])
            rows.append(row)
        for row, found in zip(rows, forward(StepPlan(rows)), strict=True):
            own = prompts.get(handles[row.slot])
            expected = seq2seq_logits(model, own, sources[row.slot], targets[row.slot])[-1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            targets[row.slot].append(int(expected.argmax()))


def both_parts(model: Any) -> dict[int, SoftPrompt]:
    return {
        PROMPT: SoftPrompt(embeddings(model, 4, 1), embeddings(model, 6, 2)),
        PLAIN: SoftPrompt(None, embeddings(model, 2, 3)),
    }


def marked(names: Iterable[str], quick: set[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(FAMILIES, {"llama", "gemma", "granite", "gpt2"}))
def test_native_decoders(name: str, tmp_path: Path) -> None:
    twins.save_checkpoint(tmp_path, twins.CONFIGS[name])
    twin = twins.make_twin(tmp_path)
    prompt = embeddings(twin.oracle, 6, 1)
    assert twin.engine.caps.soft_prompt_size == prompt.shape[1]
    twin.engine.attach(PROMPT, SoftPrompt(prompt))
    check_decoder(twin.oracle, twin.engine.forward, prompt, chunk=None)
    check_decoder(twin.oracle, twin.engine.forward, prompt, chunk=4)
    twin.engine.detach(PROMPT)
    with pytest.raises(KeyError):
        twin.engine.forward(StepPlan([Row(0, 0, [1], 0, Want.LAST, prompt=PROMPT)]))


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_native_encoder_decoders(name: str, tmp_path: Path) -> None:
    model = t5.save(t5.CONFIGS[name], tmp_path)
    engine = t5.load(tmp_path)
    prompts = both_parts(model)
    for handle, prompt in prompts.items():
        engine.attach(handle, prompt)
    check_seq2seq(model, engine.forward, prompts, t5.START)


TRANSFORMERS = ("gpt2", "opt", "bloom", "gpt_neo", "falcon-alibi", "mpt")


@pytest.mark.parametrize("name", marked(TRANSFORMERS, {"gpt2", "opt"}))
def test_the_transformers_engine(name: str, tmp_path: Path) -> None:
    model = hf_models.save_model(tmp_path, hf_models.CONFIGS[name])
    engine = hf_models.load_engine(tmp_path)
    prompt = embeddings(model, 6, 1)
    assert engine.caps.soft_prompt_size == prompt.shape[1]
    engine.attach(PROMPT, SoftPrompt(prompt))
    check_decoder(model, engine.forward, prompt, chunk=None)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_transformers_engine_with_encoder_decoders(name: str, tmp_path: Path) -> None:
    model = hf_models.save_model(tmp_path, hf_models.CONFIGS[name])
    engine = hf_models.load_engine(tmp_path)
    prompts = both_parts(model)
    for handle, prompt in prompts.items():
        engine.attach(handle, prompt)
    check_seq2seq(model, engine.forward, prompts, hf_models.START)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with connected(2) as ranks:
        yield ranks


def split(path: Path, ranks: Ranks, prompts: dict[int, SoftPrompt]) -> Forward:
    """A model in two parts, with prompts as they travel between processes."""
    config = read_json(path / "config.json", "test")
    room: Any = native_seq2seq if config["model_type"] == "t5" else native

    def load(group: Any) -> Engine:
        engine: Engine = room.load(path, config, torch.float32, group=group)
        engine.allocate(CacheShape(6, 72))
        for handle, prompt in prompts.items():
            engine.attach(handle, unpack(pack(prompt)))
        return engine

    engines: Any = ranks.each(load)

    def forward(plan: StepPlan) -> Tensor:
        first, second = ranks.each(lambda group: engines[group.shard.rank].forward(plan))
        assert not isinstance(second, Exception)
        assert isinstance(first, Tensor), first
        return first

    return forward


@pytest.mark.parametrize("name", marked(["llama", "bloom", "gpt_bigcode"], {"llama"}))
def test_split_decoders(name: str, two: Ranks, tmp_path: Path) -> None:
    twins.save_checkpoint(tmp_path, eight_heads(name))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = embeddings(model, 6, 1)
    check_decoder(model, split(tmp_path, two, {PROMPT: SoftPrompt(prompt)}), prompt, chunk=4)


def test_split_encoder_decoders(two: Ranks, tmp_path: Path) -> None:
    model = t5.save(t5.CONFIGS["t5"], tmp_path)
    prompts = both_parts(model)
    check_seq2seq(model, split(tmp_path, two, prompts), prompts, t5.START)
