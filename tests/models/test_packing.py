"""Weights that are quantised when they are loaded."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tests.kit.ranks import connected
from tests.models.twins import CONFIGS, random_ids, save_checkpoint
from tokenizers import Tokenizer

from tgis.demo import model_dir
from tgis.engines import native, native_seq2seq
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ConfigError
from tgis.models.collectives import Group
from tgis.models.kernels.linear import int8_linear
from tgis.models.packing import PACKINGS, PLAIN, choose_packing


def load(
    path: Path, dtype: torch.dtype, quantize: str | None, tokens: int = 64
) -> native.NativeEngine:
    config = json.loads((path / "config.json").read_text())
    engine = native.load(path, config, dtype, quantize=quantize)
    engine.allocate(CacheShape(2, tokens))
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_computes_in_int8(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path, CONFIGS[name])
    plan = StepPlan([Row(0, 0, random_ids(3, 40, CONFIGS[name].vocab_size), 0, Want.ALL)])
    expected = load(tmp_path, torch.float32, None).forward(plan)
    computed = load(tmp_path, dtype, "int8-dynamic").forward(plan)
    near(computed, expected)


def near(computed: torch.Tensor, expected: torch.Tensor) -> None:
    error = (computed - expected).norm() / (expected - expected.mean()).norm()
    assert 1e-4 < error < 0.25  # of tiny networks with random weights


def test_two_ranks_compute_in_int8(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama-aligned"])
    plan = StepPlan([Row(0, 0, random_ids(3, 40), 0, Want.ALL)])
    expected = load(tmp_path, torch.float32, None).forward(plan)
    config = json.loads((tmp_path / "config.json").read_text())

    def run(group: Group) -> torch.Tensor:
        engine = native.load(tmp_path, config, torch.bfloat16, group=group, quantize="int8-dynamic")
        engine.allocate(CacheShape(2, 64))
        return engine.forward(plan)

    with connected(2) as ranks:
        computed, _ = ranks.each(run)
    assert isinstance(computed, torch.Tensor)
    near(computed, expected)


SEQ2SEQ = {"t5": transformers.T5Config, "mt5": transformers.MT5Config}


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoder_decoders_compute_in_int8(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    shape = SEQ2SEQ[name](**sizes, vocab_size=160, feed_forward_proj="gated-gelu")
    torch.manual_seed(3)
    transformers.AutoModelForSeq2SeqLM.from_config(shape).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    row = Row(0, 0, [0], 0, Want.LAST, encoder_ids=random_ids(5, 30))
    logits = []
    for kind, quantize in ((torch.float32, None), (dtype, "int8-dynamic")):
        engine = native_seq2seq.load(tmp_path, config, kind, quantize=quantize)
        engine.allocate(CacheShape(2, 64))
        logits.append(engine.forward(StepPlan([row])).clone())
    near(logits[1], logits[0])


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("QUANTIZE = gguf: not supported")):
        choose_packing("gguf", torch.bfloat16)


def test_methods_refuse_what_they_do_not_compute() -> None:
    for name in PACKINGS:
        with pytest.raises(ConfigError, match="DTYPE = float16"):
            choose_packing(name, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_float32(dtype: torch.dtype) -> None:
    weight, x = torch.randn(128, 64).to(dtype), torch.randn(3, 64).to(dtype)
    kinds = [PLAIN.make_head] + ([] if dtype == torch.float16 else [int8_linear_head()])
    for make in kinds:
        assert make(weight, None)(x).dtype == torch.float32


def int8_linear_head() -> Callable[..., Callable[[torch.Tensor], torch.Tensor]]:
    assert PACKINGS["int8-dynamic"].make_linear is int8_linear
    return PACKINGS["int8-dynamic"].make_head


def perplexity(engine: native.NativeEngine, stories: list[list[int]]) -> float:
    loss, count = 0.0, 0
    for ids in stories:
        logits = engine.forward(StepPlan([Row(0, 0, ids, 0, Want.ALL)]))
        loss += float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))) * (
            len(ids) - 1
        )
        count += len(ids) - 1
    return math.exp(loss / count)


@pytest.mark.slow
def test_the_demo_model_loses_little() -> None:
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    text = (model_dir() / "README.md").read_text("utf-8")
    quotes = re.findall(r"(?:^>.*\n)+", text, re.MULTILINE)
    stories = [tokenizer.encode(re.sub("^> ", "", q, flags=re.M).strip()).ids for q in quotes]
    assert sum(map(len, stories)) > 900

    def measured(dtype: torch.dtype, quantize: str | None) -> float:
        return perplexity(load(model_dir(), dtype, quantize, 512), stories)

    exact = measured(torch.float32, None)
    assert exact < 4
    assert measured(torch.bfloat16, None) == pytest.approx(exact, rel=0.002)
    assert measured(torch.bfloat16, "int8-dynamic") == pytest.approx(exact, rel=0.005)
    assert measured(torch.bfloat16, "int8") == pytest.approx(exact, rel=0.005)
    assert measured(torch.bfloat16, "int4") == pytest.approx(exact, rel=0.04)
