"""What the Transformers engine loads, what it refuses, and what it says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.engines.hf_models import CONFIGS, load_engine, random_ids, save_model

from tgis.config import Config
from tgis.engines.hf import load
from tgis.engines.hf_load import choose_class
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ModelError
from tgis.hub.resolve import resolve

OWN_CODE = """
from transformers import MistralConfig, MistralForCausalLM

class OwnConfig(MistralConfig):
    model_type = "own"

class OwnForCausalLM(MistralForCausalLM):
    config_class = OwnConfig
"""
OWN_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_model(tmp_path, CONFIGS["mistral"])
    return tmp_path


def change_config(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("model_type", "seq2seq", "name"),
    [
        ("gpt2", False, "AutoModelForCausalLM"),
        ("t5", True, "AutoModelForSeq2SeqLM"),
        ("bart", True, "AutoModelForSeq2SeqLM"),
        ("marian", True, "AutoModelForSeq2SeqLM"),  # causal is possible too, but not what it is
        ("marian", False, "AutoModelForCausalLM"),
    ],
)
def test_the_kind_of_model(path: Path, model_type: str, seq2seq: bool, name: str) -> None:
    change_config(path, model_type=model_type, is_encoder_decoder=seq2seq)
    assert choose_class(resolve(Config(model_name=str(path))), False) == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "Unsupported model type vit"),
        ({"model_type": "t5", "is_encoder_decoder": False}, "Unsupported model type t5"),
        ({"model_type": "own", "auto_map": OWN_MAP}, "not run unless --trust-remote-code=true"),
        ({"model_type": "own", "auto_map": {}}, "Unsupported model type own"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "awq quantization not supported by hf_transformers engine",
        ),
        ({"num_hidden_layers": 4}, r"weight model\.layers\.3\..* does not exist \(9 are"),
        (
            {"vocab_size": 200},
            r"weight lm_head\.weight has shape \[131, 48\], but config\.json asks for \[200, 48\]",
        ),
        ({"num_attention_heads": "x"}, "Transformers cannot load it: Validation error for field"),
    ],
)
def test_refusals(path: Path, changes: dict[str, Any], message: str) -> None:
    change_config(path, **changes)
    with pytest.raises(ModelError, match=message) as refused:
        load_engine(path)
    assert "\n" not in str(refused.value)


def test_models_that_cannot_go_on_from_a_cache(tmp_path: Path) -> None:
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    save_model(tmp_path, config)
    with pytest.raises(ModelError, match=r"BertLMHeadModel.*keeps no cache"):
        load_engine(tmp_path)


def test_no_first_token_for_the_decoder(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["t5"])
    change_config(tmp_path, decoder_start_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json has no decoder_start_token_id"):
        load_engine(tmp_path)


def test_code_of_the_model_runs_only_when_it_is_trusted(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    expected = load_engine(path).forward(StepPlan([Row(0, 0, [5, 6, 7], 0, Want.ALL)]))
    change_config(path, model_type="own", auto_map=OWN_MAP)
    (path / "own.py").write_text(OWN_CODE)
    with pytest.raises(ModelError, match="trust-remote-code"):
        load_engine(path)
    engine = load_engine(path, trust_remote_code=True)
    assert torch.equal(engine.forward(StepPlan([Row(0, 0, [5, 6, 7], 0, Want.ALL)])), expected)


def test_code_is_not_needed_for_models_that_transformers_knows(path: Path) -> None:
    change_config(path, auto_map=OWN_MAP)
    (path / "own.py").write_text("raise AssertionError('not to be run')")
    assert load_engine(path).caps.name == "hf_transformers"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_chosen_by_a_setting(path: Path, implementation: str) -> None:
    engine = load_engine(path, transformers_attn_impl=implementation)
    assert engine._network._model.config._attn_implementation == implementation


def test_attention_that_is_not_there(path: Path) -> None:
    with pytest.raises(ModelError, match=r"with TRANSFORMERS_ATTN_IMPL = nonsense: .*nonsense"):
        load_engine(path, transformers_attn_impl="nonsense")


def test_better_transformer_is_pytorch_now(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        engine = load_engine(path, deployment_framework="hf_optimum_bt")
    assert engine._network._model.config._attn_implementation == "sdpa"
    assert sum("BetterTransformer is part of PyTorch now" in line for line in caplog.messages) == 1


def test_the_log_is_ours(
    path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"unexpected": torch.ones(2)}, path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("DEBUG"):
        engine = load_engine(path)
        logging.getLogger("transformers").warning("nobody wants to know")
        engine.forward(StepPlan([Row(0, 0, [5, 6, 7], 0, Want.ALL)]))
    assert all(record.name.startswith("tgis.") for record in caplog.records), caplog.text
    assert caplog.messages == ["MistralForCausalLM: all sequences share a pass"]
    assert "".join(capfd.readouterr()) == ""


def test_progress_reaches_the_size_of_the_files(path: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = Config(model_name=str(path))
    load(config, resolve(config), torch.float32, lambda *call: calls.append(call))
    size = (path / "model.safetensors").stat().st_size
    done = [done for done, _ in calls]
    assert len(calls) > 10
    assert done == sorted(done)
    assert done[-1] == size
    assert {total for _, total in calls} == {size}


def test_weights_in_several_files(tmp_path: Path, path: Path) -> None:
    ids = list(random_ids(3, 7))
    expected = load_engine(path).forward(StepPlan([Row(0, 0, ids, 0, Want.LAST)]))
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    found = load_engine(sharded).forward(StepPlan([Row(0, 0, ids, 0, Want.LAST)]))
    assert torch.equal(found, expected)
