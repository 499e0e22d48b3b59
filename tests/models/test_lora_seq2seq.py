"""LoRA in encoder-decoders against `transformers` with merged weights."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.adapters.lora_files import read
from tests.engines.test_native_seq2seq import CONFIGS, INPUTS, START, first, load, reference, save
from tests.models.lora_twins import merged, random_lora, targets
from torch import Tensor

from tgis.engines.native_seq2seq import NativeSeq2SeqEngine
from tgis.engines.plan import Row, StepPlan, Want

pytestmark = pytest.mark.usefixtures("single_thread")

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param)
    model = save(CONFIGS[request.param], path)
    return model, load(path)


def with_lora(row: Row, handle: int) -> Row:
    row.lora = handle
    return row


def test_every_target_alone(pair: Any) -> None:
    model, engine = pair
    found = targets(engine)
    names = {name.removeprefix("decoder.").removeprefix("encoder.") for name in found}
    assert len(names) > 12
    target = [START, 5, 17]
    plain = reference(model, INPUTS[1], target)
    for number, one in enumerate(found.values(), start=1):
        if ".block.0." in one.name:  # the last block of each stack has everything, too
            continue
        lora = random_lora([one], seed=number)
        engine.attach(number, lora)
        row = with_lora(first(0, INPUTS[1], target), number)
        computed = engine.forward(StepPlan([row]))
        engine.detach(number)
        expected = reference(merged(model, lora, found), INPUTS[1], target)
        assert (expected - plain).abs().max() > 0.001, one.name
        torch.testing.assert_close(computed, expected, **TOLERANCE, msg=one.name)


def test_mixed_sequences_token_by_token(pair: Any) -> None:
    model, engine = pair
    found, models = targets(engine), {0: model}
    for handle, ranks in ((101, (4,)), (102, (1, 8, 3))):
        lora = random_lora(found.values(), ranks, seed=handle)
        engine.attach(handle, lora)
        models[handle] = merged(model, lora, found)
    handles = [101, 0, 102, 101]
    target = [START, 5, 17, 60]
    expected = [
        reference(models[handle], source, target)
        for handle, source in zip(handles, INPUTS, strict=True)
    ]
    for place, token in enumerate(target):
        rows = [
            first(slot, source) if place == 0 else Row(slot, slot, [token], place, Want.LAST)
            for slot, source in enumerate(INPUTS)
        ]
        plan = StepPlan([with_lora(row, h) for row, h in zip(rows, handles, strict=True)])
        last = torch.stack([logits[place] for logits in expected])
        torch.testing.assert_close(engine.forward(plan), last, **TOLERANCE)


def test_bfloat16_computes_the_last_layer_in_float32(tmp_path: Path) -> None:
    model = save(CONFIGS["t5-1.1"], tmp_path)
    exact, rough = load(tmp_path), load(tmp_path, torch.bfloat16)
    lora = random_lora(targets(exact).values())
    expected = reference(merged(model, lora, targets(exact)), INPUTS[1], [START, 5, 17])
    for engine, tolerance in ((exact, 1e-4), (rough, 0.05 * float(expected.std()) + 0.05)):
        engine.attach(1, lora)
        row = with_lora(first(0, INPUTS[1], [START, 5, 17]), 1)
        error = engine.forward(StepPlan([row])) - expected
        assert error.square().mean().sqrt() < tolerance


def test_an_adapter_that_peft_has_trained(tmp_path: Path) -> None:
    model = save(CONFIGS["mt5"], tmp_path / "model")
    engine = load(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries tell each other
        expected = train(model, tmp_path / "a")
    compare(engine, tmp_path, expected)


def train(model: Any, out: Path) -> Tensor:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    for _ in range(3):
        labels = torch.tensor([[5, 6, 7]])
        adapted(input_ids=torch.tensor([INPUTS[1]]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(out)
    return reference(adapted, INPUTS[1], [START, 5, 17])


def compare(engine: NativeSeq2SeqEngine, root: Path, expected: Tensor) -> None:
    assert engine.caps.lora_targets is not None
    engine.attach(1, read(root, engine.caps.lora_targets))
    rows = [with_lora(first(n, INPUTS[1], [START, 5, 17]), 1 - n) for n in range(2)]
    computed, plain = engine.forward(StepPlan(rows)).split(3)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(computed, expected, **TOLERANCE)
