import json

import pytest

from tgis.hub.facts import ENCODER_DECODER_TYPES, read_facts, remote_code_refusal
from tgis.types import ModelKind


def facts(path, config=None, **files):
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return read_facts({"model_type": "llama", **(config or {})}, path, "m")


def test_encoder_decoder_types_are_those_of_transformers():
    from transformers.models.auto import modeling_auto

    assert set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) >= ENCODER_DECODER_TYPES


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, ModelKind.DECODER_ONLY),
        ({"is_encoder_decoder": True}, ModelKind.ENCODER_DECODER),
        ({"model_type": "t5"}, ModelKind.ENCODER_DECODER),
        ({"model_type": "bart"}, ModelKind.ENCODER_DECODER),
        ({"model_type": "bart", "is_encoder_decoder": False}, ModelKind.DECODER_ONLY),
    ],
)
def test_kind(tmp_path, config, kind):
    assert facts(tmp_path, config)["kind"] is kind


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": 9, "n_positions": 8}, 9),
        ({"seq_len": 3, "max_seq_length": 4, "n_positions": 8}, 8),
        ({"max_position_embeddings": None, "max_seq_len": 5}, 5),
        ({"max_position_embeddings": "12", "seq_length": 6}, 6),
        ({"max_position_embeddings": -1, "max_sequence_length": 7}, 7),
        ({"max_position_embeddings": True}, None),
        ({"text_config": {"max_position_embeddings": 11}}, 11),
        ({"text_config": {"max_position_embeddings": 11}, "seq_len": 4}, 4),
    ],
)
def test_max_length(tmp_path, config, length):
    assert facts(tmp_path, config)["max_length"] == length


def test_eos_of_the_config_comes_first(tmp_path):
    found = facts(tmp_path, {"eos_token_id": [5, 6]}, generation_config={"eos_token_id": 7})
    assert found["eos_token_ids"] == (5, 6)
    assert facts(tmp_path, {"eos_token_id": 0})["eos_token_ids"] == (0,)
    assert facts(tmp_path, {"text_config": {"eos_token_id": 4}})["eos_token_ids"] == (4,)


def test_eos_of_the_generation_config_comes_second(tmp_path):
    tokenizer = {"eos_token": "</s>", "added_tokens_decoder": {"2": {"content": "</s>"}}}
    found = facts(
        tmp_path,
        {"eos_token_id": None},
        generation_config={"eos_token_id": [7]},
        tokenizer_config=tokenizer,
    )
    assert found["eos_token_ids"] == (7,)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_eos_of_the_tokenizer_comes_last(tmp_path, token):
    added = {"1": {"content": "<s>"}, "2": {"content": "</s>"}}
    settings = {"eos_token": token, "added_tokens_decoder": added}
    assert facts(tmp_path, tokenizer_config=settings)["eos_token_ids"] == (2,)
    del settings["added_tokens_decoder"]
    tokenizer = {"added_tokens": [{"id": 1, "content": "<s>"}, {"id": 9, "content": "</s>"}]}
    found = facts(tmp_path, tokenizer_config=settings, tokenizer=tokenizer)
    assert found["eos_token_ids"] == (9,)


def test_no_eos_at_all(tmp_path):
    assert facts(tmp_path)["eos_token_ids"] == ()


def test_pad_falls_back_to_eos(tmp_path):
    assert facts(tmp_path, {"pad_token_id": 3, "eos_token_id": 2})["pad_token_id"] == 3
    assert facts(tmp_path, {"pad_token_id": -1, "eos_token_id": 2})["pad_token_id"] == 2
    assert facts(tmp_path)["pad_token_id"] is None


def test_start_of_the_decoder(tmp_path):
    t5 = {"model_type": "t5", "bos_token_id": 4}
    assert facts(tmp_path, t5)["decoder_start_token_id"] == 4
    assert facts(tmp_path, t5 | {"decoder_start_token_id": 0})["decoder_start_token_id"] == 0
    assert facts(tmp_path, {"bos_token_id": 4})["decoder_start_token_id"] is None


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, None),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "float32"}}, "float32"),
    ],
)
def test_dtype(tmp_path, config, dtype):
    assert facts(tmp_path, config)["dtype"] == dtype


def test_quantization(tmp_path):
    assert facts(tmp_path)["quantization"] is None
    awq = {"quant_method": "awq"}
    assert facts(tmp_path, {"quantization_config": awq})["quantization"] == awq
    found = facts(tmp_path, quantize_config={"bits": 4})
    assert found["quantization"] == {"quant_method": "gptq", "bits": 4}


def test_code_of_its_own(tmp_path):
    assert facts(tmp_path)["auto_map"] is False
    assert facts(tmp_path, {"auto_map": {"AutoModelForCausalLM": "a.B"}})["auto_map"] is True
    assert "TRUST_REMOTE_CODE" in str(remote_code_refusal("some/model"))


def test_broken_optional_files_are_passed_over(tmp_path):
    for name in ("generation_config", "tokenizer_config", "tokenizer", "quantize_config"):
        (tmp_path / f"{name}.json").write_text("{")
    assert facts(tmp_path, {"eos_token_id": 1})["eos_token_ids"] == (1,)
