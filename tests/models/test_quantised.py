"""Every native family with quantised weights against itself with what these stand for."""

import json
from pathlib import Path

import pytest
import torch
from tests.engines import test_native_seq2seq as seq2seq
from tests.models import quantised, twins
from tests.models.lora_twins import random_lora, targets
from torch import Tensor

from tgis.engines import native, native_seq2seq
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models.packing import INT4_GROUP

CONFIGS = {**twins.CONFIGS, **seq2seq.CONFIGS}
STORED = {"gptq": ("gptq", 4), "gptq-8": ("gptq", 8), "awq": ("awq", 4)}
"""What is tested -> method, bits."""

LOADING = {"int8": (8, -1), "int4": (4, INT4_GROUP)}
"""`QUANTIZE` -> bits, input features of a group."""

# One of each type, and those whose projections are laid out in another way.
_ALSO = {"falcon-40b", "falcon-mha", "gpt_bigcode-mha", "llama-tied", "t5-1.1"}
_FIRST = {config.model_type: name for name, config in reversed(CONFIGS.items())}
NAMES = sorted({*_FIRST.values(), *_ALSO})
_QUICK = {"llama", "gpt2", "falcon-40b", "gpt_neox", "bloom", "t5-1.1"}
_PARAMETERS = [
    name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
]


@pytest.fixture(scope="module", params=_PARAMETERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param]
    if request.param in seq2seq.CONFIGS:
        seq2seq.save(config, path)
    else:
        twins.save_checkpoint(path, config)
    return path


def logits(path: Path, quantize: str | None = None) -> Tensor:
    config = json.loads((path / "config.json").read_text())
    is_seq2seq = config["model_type"] in ("t5", "mt5")
    engine = (native_seq2seq if is_seq2seq else native).load(
        path, config, torch.float32, quantize=quantize
    )
    engine.allocate(CacheShape(2, 72))
    ids = twins.random_ids(0, 12)
    row = Row(0, 0, ids, 0, Want.ALL, encoder_ids=ids if is_seq2seq else None)
    return engine.forward(StepPlan([row])).clone()


@pytest.mark.parametrize("stored", STORED)
def test_stored_quantised(checkpoint: Path, tmp_path: Path, stored: str) -> None:
    ours, floats = quantised.make_pair(checkpoint, tmp_path, *STORED[stored])
    expected = logits(floats)
    assert not torch.allclose(expected, logits(checkpoint), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", LOADING)
def test_quantised_while_loading(checkpoint: Path, tmp_path: Path, quantize: str) -> None:
    floats = quantised.make_floats(checkpoint, tmp_path / "floats", *LOADING[quantize])
    ours, expected = logits(checkpoint, quantize), logits(floats)
    assert not torch.allclose(expected, logits(checkpoint), rtol=0, atol=1e-3)
    if json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]:
        # A tied head has 8 bits, but the embeddings keep theirs.
        assert (ours - expected).norm() < 0.01 * expected.norm()
    else:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "falcon-40b", "gpt_neox"])
def test_lora_on_quantised_layers(name: str, tmp_path: Path) -> None:
    twins.save_checkpoint(tmp_path / "model", CONFIGS[name])
    ours, floats = (
        twins.load_engine(path)
        for path in quantised.make_pair(tmp_path / "model", tmp_path, "gptq", 4)
    )
    lora = random_lora(targets(floats).values(), (4, 2))
    ids = twins.random_ids(0, 12)
    computed = []
    for engine in (ours, floats):
        engine.attach(1, lora)
        rows = [Row(n, n, ids, 0, Want.ALL, lora=n) for n in (0, 1)]
        computed.append(engine.forward(StepPlan(rows)).clone())
    assert not torch.allclose(*computed[0].chunk(2), rtol=0, atol=0.01)
    torch.testing.assert_close(*computed, rtol=1e-4, atol=1e-4)
