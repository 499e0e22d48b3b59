"""Encoder-decoders of the native engine against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tgis.engines import native_seq2seq
from tgis.engines.base import CacheShape
from tgis.engines.native_seq2seq import NativeSeq2SeqEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ModelError
from tgis.hub.resolve import read_json

T5 = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 60,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "initializer_factor": 1.0,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu"}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "t5": transformers.T5Config(**T5),
    "t5-1.1": transformers.T5Config(**T5, **GATED, tie_word_embeddings=False),
    "t5-odd": transformers.T5Config(
        **{**T5, "num_heads": 3, "d_kv": 20, "vocab_size": 77}, feed_forward_proj="gated-silu"
    ),
    "mt5": transformers.MT5Config(**T5, **GATED),
}
INPUTS = [[5, 9, 1], [7, 3, 99 % 77, 4, 8, 2, 6, 1], list(range(2, 40)), [1]]
START = 0


def save(config: transformers.PretrainedConfig, path: Path) -> Any:
    torch.manual_seed(3)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    model.save_pretrained(path)
    return model


def load(path: Path, dtype: torch.dtype = torch.float32) -> NativeSeq2SeqEngine:
    engine = native_seq2seq.load(path, read_json(path / "config.json", "test"), dtype)
    engine.allocate(CacheShape(6, 72))
    return engine


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param)
    model = save(CONFIGS[request.param], path)
    return model, load(path), path


def reference(model: Any, source: list[int], target: list[int]) -> Tensor:
    """Logits after each token of `target`."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]))
    logits: Tensor = out.logits[0].float()
    return logits


def first(slot: int, source: list[int], target: list[int] | None = None) -> Row:
    return Row(slot, slot, target or [START], 0, Want.ALL, encoder_ids=source)


def test_one_sequence_whole_and_token_by_token(pair: Any) -> None:
    model, engine, _ = pair
    target = [START, 5, 17, 60, 3, 3, 9]
    expected = reference(model, INPUTS[1], target)
    whole = engine.forward(StepPlan([first(2, INPUTS[1], target)]))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    engine.forward(StepPlan([first(4, INPUTS[1])]))
    for place, token in enumerate(target[1:], start=1):
        logits = engine.forward(StepPlan([Row(4, 4, [token], place, Want.LAST)]))
        torch.testing.assert_close(logits[0], expected[place], rtol=0, atol=1e-4)


def test_sequences_of_mixed_lengths_join_and_leave(pair: Any) -> None:
    model, engine, _ = pair
    targets = {slot: [START] for slot in range(4)}
    steps = 12
    for step in range(steps):
        rows = []
        for slot, target in targets.items():
            if slot > step:  # joins later
                continue
            if len(target) == 1:
                rows.append(first(slot, INPUTS[slot]))
            elif not (slot == 1 and step > 8):  # leaves early
                rows.append(Row(slot, slot, [target[-1]], len(target) - 1, Want.LAST))
        for row, logits in zip(rows, engine.forward(StepPlan(rows)), strict=True):
            expected = reference(model, INPUTS[row.slot], targets[row.slot])[-1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
            targets[row.slot].append(int(logits.argmax()))
    assert [len(target) for target in targets.values()] == [13, 9, 11, 10]


def test_64_greedy_tokens_are_those_of_the_whole_network(pair: Any) -> None:
    model, engine, _ = pair
    expected, target = [START], [START]
    row = first(0, INPUTS[2])
    for _ in range(64):
        expected.append(int(reference(model, INPUTS[2], expected)[-1].argmax()))
        target.append(int(engine.forward(StepPlan([row]))[-1].argmax()))
        row = Row(0, 0, [target[-1]], len(target) - 1, Want.LAST)
    assert target == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_types_are_near(pair: Any, dtype: torch.dtype) -> None:
    model, _, path = pair
    target = [START, 5, 17]
    expected = reference(model, INPUTS[1], target)
    logits = load(path, dtype).forward(StepPlan([first(0, INPUTS[1], target)]))
    scale = expected.abs().max()
    assert (logits - expected).abs().max() < (0.05 if dtype == torch.bfloat16 else 0.01) * scale


def test_a_slot_is_used_again(pair: Any) -> None:
    model, engine, _ = pair
    engine.forward(StepPlan([first(5, INPUTS[2], [START, 4, 5, 6])]))
    engine.release([5])
    logits = engine.forward(StepPlan([first(5, INPUTS[0])]))
    expected = reference(model, INPUTS[0], [START])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_the_tiny_model_with_real_tokens(shared_dir: Path) -> None:
    path = shared_dir / "models" / "tiny-t5"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = load(path)
    expected = reference(model, [100, 200, 1], [START, 7])
    logits = engine.forward(StepPlan([first(0, [100, 200, 1], [START, 7])]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"feed_forward_proj": "gated-swoosh"}, "gated-swoosh"),
        ({"model_type": "umt5"}, "umt5"),
        ({"d_ff": 61}, "DenseReluDense"),
        ({"num_decoder_layers": 2}, r"decoder.block.2"),
        ({"num_heads": 7}, "SelfAttention"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    save(CONFIGS["t5"], tmp_path)
    config = {**read_json(tmp_path / "config.json", "test"), **changes}
    with pytest.raises(ModelError, match=text):
        native_seq2seq.load(tmp_path, config, torch.float32)
