"""LoRA trained and saved by PEFT itself changes what a model says as PEFT does."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.adapters.lora_files import read
from tests.models.twins import CONFIGS, load_engine, random_ids, save_checkpoint
from torch import Tensor

from tgis.engines.native import NativeEngine
from tgis.engines.plan import Row, StepPlan, Want

pytestmark = pytest.mark.usefixtures("single_thread")

IDS = random_ids(1, 30)

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "attention": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2, r".*layers\.1\..*q_proj": 7},
        "alpha_pattern": {"model.layers.0.mlp.up_proj": 1, "o_proj": 40},
    },
    "vocabulary": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "one layer": {"target_modules": ["o_proj"], "layers_to_transform": [2]},
}


def train(path: Path, out: Path, seed: int = 0, **options: Any) -> Tensor:
    """Train an adapter for a few steps and save it; PEFT's logits after each of `IDS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries tell each other
        return _train(path, out, seed, options)


def _train(path: Path, out: Path, seed: int, options: dict[str, Any]) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **options})
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    ids = torch.tensor([random_ids(seed + 2, 20)])
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    adapted.save_pretrained(out)
    with torch.no_grad():
        logits: Tensor = adapted(torch.tensor([IDS])).logits[0]
    return logits


def engine_of(path: Path, name: str) -> NativeEngine:
    save_checkpoint(path / "model", CONFIGS[name])
    return load_engine(path / "model")


def attach(engine: NativeEngine, root: Path, adapter_id: str, handle: int) -> None:
    assert engine.caps.lora_targets is not None
    lora = read(root, engine.caps.lora_targets, adapter_id=adapter_id)
    engine.attach(handle, lora)


def logits(engine: NativeEngine, *handles: int) -> list[Tensor]:
    """Those of `IDS` with each adapter, all in one step."""
    rows = [Row(n, n, IDS, 0, Want.ALL, lora=handle) for n, handle in enumerate(handles)]
    return list(engine.forward(StepPlan(rows)).split(len(IDS)))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tmp_path: Path, name: str) -> None:
    engine = engine_of(tmp_path, "llama")
    expected = train(tmp_path / "model", tmp_path / "a", **OPTIONS[name])
    attach(engine, tmp_path, "a", 1)
    computed, plain = logits(engine, 1, 0)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "falcon-40b", "gpt_bigcode", "opt"])
def test_families(tmp_path: Path, name: str) -> None:
    """All matrices of the blocks, whatever they are called and however they are stored."""
    engine = engine_of(tmp_path, name)
    expected = train(tmp_path / "model", tmp_path / "a", target_modules="all-linear")
    attach(engine, tmp_path, "a", 1)
    computed, plain = logits(engine, 1, 0)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)


def test_several_in_one_batch(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "qwen2")
    expected = {}
    for handle, (name, options) in enumerate(OPTIONS.items(), start=1):
        expected[handle] = train(tmp_path / "model", tmp_path / name.split()[0], handle, **options)
        attach(engine, tmp_path, name.split()[0], handle)
    expected[0] = logits(engine, 0)[0]
    order = [3, 1, 0, 5, 2, 4]
    for handle, computed in zip(order, logits(engine, *order), strict=True):
        torch.testing.assert_close(computed, expected[handle], rtol=0, atol=1e-4)
