"""The bundled model: complete, small, loadable by others, and able to tell a story."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tgis.demo import model_dir

SIZE_LIMIT = 12 * 2**20
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
PLAIN_CHARACTERS = set(string.ascii_letters + string.digits + string.punctuation + " \n")
COMMON_WORDS = {"a", "and", "he", "her", "his", "it", "said", "she", "the", "they", "to", "was"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()


def config() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((model_dir() / "config.json").read_text("utf-8"))
    return content


def greedy(model: Any, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=400, do_sample=False)
    continuation: list[int] = output[0, ids.shape[1] :].tolist()
    return continuation


def test_the_folder_is_complete_and_small() -> None:
    assert {path.name for path in model_dir().iterdir()} == FILES
    package = Path(model_dir()).parent
    size = sum(p.stat().st_size for p in package.rglob("*") if "__pycache__" not in p.parts)
    assert size <= SIZE_LIMIT


def test_weights_are_bfloat16_and_the_output_layer_is_tied() -> None:
    assert config()["tie_word_embeddings"] is True
    with safe_open(model_dir() / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_configuration_and_tokenizer_agree(tokenizer: Tokenizer) -> None:
    facts = config()
    assert facts["architectures"] == ["LlamaForCausalLM"]
    assert tokenizer.get_vocab_size() == facts["vocab_size"]
    assert tokenizer.token_to_id("<s>") == facts["bos_token_id"]
    assert tokenizer.token_to_id("<|endoftext|>") == facts["eos_token_id"]
    assert tokenizer.token_to_id("<pad>") == facts["pad_token_id"]


def test_transformers_encodes_as_the_tokenizer_file_does(tokenizer: Tokenizer) -> None:
    text = "Once upon a time, Zoë found 3 cats."
    loaded = AutoTokenizer.from_pretrained(model_dir())
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert tokenizer.encode(text).ids[0] == loaded.bos_token_id
    assert loaded.eos_token_id == config()["eos_token_id"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "prompt", ["Once upon a time", "One day, Tim and his mom went to the park."]
)
def test_greedy_stories_are_english_and_end(model: Any, tokenizer: Tokenizer, prompt: str) -> None:
    continuation = greedy(model, tokenizer, prompt)
    assert continuation[-1] == config()["eos_token_id"]
    story = tokenizer.decode(continuation)
    assert set(story) <= PLAIN_CHARACTERS
    words = story.lower().split()
    assert len(words) > 20
    assert len(COMMON_WORDS.intersection(words)) >= 5


def test_a_full_context_keeps_its_sense(model: Any, tokenizer: Tokenizer) -> None:
    # Stories fill the window one after another in training, up to its very end.
    eos = config()["eos_token_id"]
    story = [
        *tokenizer.encode("Once upon a time").ids,
        *greedy(model, tokenizer, "Once upon a time"),
    ]
    length = config()["max_position_embeddings"]
    ids = torch.tensor([(story * (length // len(story) + 1))[:length]])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert story[-1] == eos
    assert loss < 2.0
