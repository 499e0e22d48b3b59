"""The IBM FMS engine: what it serves is what Transformers gives; what it gets wrong is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

pytest.importorskip("fms", reason="the extra tgis[fms] is not installed")

from safetensors.torch import load_file, save_file
from tests.engines.hf_models import CONFIGS as ALL
from tests.engines.hf_models import GPT, SMALL, random_ids, save_model
from tests.engines.onnx_files import joining_and_leaving
from tests.engines.test_hf import Loaded, check_any_company

from tgis.config import Config
from tgis.engines import fms
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.registry import load_engine
from tgis.errors import ConfigError, ModelError
from tgis.hub.resolve import resolve

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

pytestmark = pytest.mark.usefixtures("single_thread")
MISTRAL = SMALL | {"intermediate_size": 256, "num_key_value_heads": 2}  # multiples of 256 only
FACTORS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
CONFIGS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-tied": hf.LlamaConfig(
        **SMALL, num_key_value_heads=3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama3": hf.LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=LLAMA3),
    "gpt_bigcode": hf.GPTBigCodeConfig(**GPT, n_inner=100),
    "granite": hf.GraniteConfig(**SMALL, num_key_value_heads=2, **FACTORS),
    "mistral": hf.MistralConfig(**MISTRAL, sliding_window=None, head_dim=16),
}


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = Config(model_name=str(path), deployment_framework=fms.NAME)
    return fms.load(config, resolve(config), dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_that_join_and_leave(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path, CONFIGS[name])
    engine = load(tmp_path)
    assert engine._batching == "padded"
    joining_and_leaving(model, engine)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_the_same_in_any_company(tmp_path: Path, seed: int) -> None:
    model = save_model(tmp_path, CONFIGS["llama"])
    check_any_company(Loaded("", model, load(tmp_path)), seed)


def test_logits_of_every_position(tmp_path: Path) -> None:
    model = save_model(tmp_path, CONFIGS["granite"])
    rows = [Row(n, n, list(random_ids(n, 5 + n)), 0, Want.ALL) for n in range(2)]
    found = load(tmp_path).forward(StepPlan(rows))
    with torch.no_grad():
        expected = [model(torch.tensor([row.token_ids])).logits[0] for row in rows]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)


def test_what_the_engine_says_of_itself(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"])
    config = Config(model_name=str(tmp_path), deployment_framework=fms.NAME, dtype="bfloat16")
    told: list[tuple[int, int]] = []
    engine = load_engine(config, resolve(config), lambda *call: told.append(call))
    assert (engine.caps.name, engine.caps.dtype) == (fms.NAME, "bfloat16")
    assert engine.caps.kv_bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert engine.caps.max_positions == 128
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            ALL["gpt_neox"],
            r"Unknown model type gpt_neox passed to ibm_fms engine. \(It serves gpt_",
        ),
        (ALL["mistral"], "ibm_fms does not support sliding_window = 5; DEPLOYMENT_FRAMEWORK = "),
        (
            hf.LlamaConfig(**SMALL, rope_parameters={**LLAMA3, "rope_type": "linear"}),
            "ibm_fms does not support rope_type = linear",
        ),
        (
            hf.GraniteConfig(**SMALL, rope_parameters=LLAMA3),
            "ibm_fms does not support rope_type = llama3",
        ),
        (hf.LlamaConfig(**SMALL, head_dim=16), "ibm_fms does not support head_dim = 16"),
        (hf.LlamaConfig(**SMALL, hidden_act="gelu"), "does not support hidden_act = gelu"),
        (
            hf.GPTBigCodeConfig(**GPT, n_inner=100, multi_query=False),
            "ibm_fms does not support multi_query = False",
        ),
        (hf.GPTBigCodeConfig(**GPT), "ibm_fms cannot load it: TypeError: "),
    ],
)
def test_what_the_library_gets_wrong_is_refused(tmp_path: Path, config: Any, text: str) -> None:
    save_model(tmp_path, config)
    with pytest.raises(ModelError, match=text) as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


def change_config(path: Path, **changes: Any) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))


def test_other_heads_and_quantised_weights(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"])
    change_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match="begins with LlamaForSequenceClassification; ibm_fms"):
        load(tmp_path)
    gptq = {"quant_method": "gptq", "bits": 4}
    change_config(tmp_path, architectures=["LlamaForCausalLM"], quantization_config=gptq)
    with pytest.raises(ModelError, match="gptq quantization not supported by ibm_fms engine"):
        load(tmp_path)


def test_missing_and_mismatched_weights(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.layers.1.input_layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are missing: the model has \d+ numbers, its"):
        load(tmp_path)
    weights["model.layers.1.input_layernorm.weight"] = norm[:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="ibm_fms cannot load it: ValueError: Shape mismatch"):
        load(tmp_path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, CONFIGS["llama"])
    monkeypatch.setitem(sys.modules, "fms.models", None)
    text = r"DEPLOYMENT_FRAMEWORK = ibm_fms needs ibm-fms .*: pip install 'tgis\[fms\]'"
    with pytest.raises(ConfigError, match=text):
        load(tmp_path)
