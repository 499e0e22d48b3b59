"""A `tokenizer.json` for every model: found, made, or refused with the cause."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tgis.errors import ModelError
from tgis.hub import fast_tokenizer
from tgis.hub.fast_tokenizer import convert, ensure_fast_tokenizer
from tgis.hub.tokenizer_settings import kept_bos

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "once", "upon", "a", "time", "##s"]
BERT = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def model(directory: Path, **files: Any) -> Path:
    """A model directory of these files; underlines stand for dots, mappings for JSON."""
    directory.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_a_model_with_a_fast_tokenizer_is_left_alone(tmp_path: Path) -> None:
    path = model(tmp_path / "model", tokenizer__json={}, vocab__txt="a")
    assert ensure_fast_tokenizer(path, tmp_path, trust_remote_code=False) == path
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_a_vocabulary_is_converted_into_a_new_directory(tmp_path: Path) -> None:
    path = model(
        tmp_path / "model",
        vocab__txt="\n".join(WORDS),
        tokenizer_config__json=BERT,
        config__json={"model_type": "bert", "vocab_size": len(WORDS)},
    )
    made = ensure_fast_tokenizer(path, tmp_path, trust_remote_code=False)
    assert made.parent == tmp_path
    assert made != path
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokens = tokenizer.encode("Once upon times").tokens
    assert tokens == ["[CLS]", "once", "upon", "time", "##s", "[SEP]"]
    assert json.loads((made / "tokenizer_config.json").read_text()) == BERT
    assert (made / "config.json").is_file()
    assert not (path / "tokenizer.json").exists()


def test_a_failed_conversion_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    path = model(
        tmp_path / "model",
        vocab__txt="\n".join(WORDS),
        tokenizer_config__json=BERT,
        config__json={"model_type": "bert", "vocab_size": 30522},
    )
    with pytest.raises(ModelError) as refused:
        ensure_fast_tokenizer(path, tmp_path, trust_remote_code=False)
    assert str(refused.value) == (
        f"cannot make tokenizer.json from the files in {path}: "
        f"ModelError: they give {len(WORDS)} tokens, but the model has 30522"
    )
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_nothing_to_convert(tmp_path: Path) -> None:
    path = model(tmp_path / "model", tokenizer_config__json={"tokenizer_class": "T5Tokenizer"})
    with pytest.raises(ModelError) as refused:
        ensure_fast_tokenizer(path, tmp_path, trust_remote_code=False)
    assert str(refused.value) == (
        f"No existing fast tokenizer (tokenizer.json) found in {path}, nor a file to make one from "
        "(tokenizer.model, spiece.model, sentencepiece.bpe.model, spm.model, vocab.json, vocab.txt)"
    )
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_sentencepiece_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_tokenizer, "find_spec", lambda name: None)
    path = model(tmp_path / "model", spiece__model="")
    with pytest.raises(ModelError, match=r"install the Python package sentencepiece$"):
        convert(path, tmp_path, trust_remote_code=False)


def test_a_converter_without_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_tokenizer, "_TIMEOUT", 0.0)
    path = model(tmp_path / "model", vocab__txt="a")
    with pytest.raises(ModelError, match=r"took too long$"):
        convert(path, tmp_path, trust_remote_code=False)


def test_the_caller_never_imports_transformers() -> None:
    code = "import sys, tgis.hub.fast_tokenizer; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "files", "settings"),
    [
        ("tokenizers/llama2", ["tokenizer.model", "tokenizer_config.json"], None),
        ("tokenizers/gpt2", ["vocab.json", "merges.txt", "tokenizer_config.json"], None),
        ("tokenizers/bert-uncased", ["vocab.txt", "tokenizer_config.json"], None),
        ("models/stories260K", ["tokenizer.model", "config.json"], None),
        ("models/stories260K", ["tokenizer.model", "config.json", "tokenizer_config.json"], None),
        ("models/stories260K", ["tokenizer.model"], {"tokenizer_class": "LlamaTokenizer"}),
    ],
)
def test_conversion_gives_the_tokenizer_that_the_model_came_with(
    shared_dir: Path, tmp_path: Path, source: str, files: list[str], settings: dict[str, Any] | None
) -> None:
    path = model(tmp_path / "model")
    for name in files:
        shutil.copyfile(shared_dir / source / name, path / name)
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    made = ensure_fast_tokenizer(path, tmp_path, trust_remote_code=False)
    ours = Tokenizer.from_file(str(made / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(shared_dir / source / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    for text in ("Once upon a time", " Zoë  met\n\t日本 😀!", "", "<s>a</s> b"):
        encoding = ours.encode(text)
        assert encoding.ids == theirs.encode(text).ids
        assert ours.decode(encoding.ids) == theirs.decode(encoding.ids)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"config__json": {"model_type": "llama"}}, "<s>"),
        ({"config__json": {"model_type": "falcon"}}, None),
        ({"tokenizer_config__json": {"tokenizer_class": "GemmaTokenizerFast"}}, "<bos>"),
        (
            {"tokenizer_config__json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}},
            "<|endoftext|>",
        ),
        (
            {
                "tokenizer_config__json": {"tokenizer_class": "LlamaTokenizer"},
                "special_tokens_map__json": {"bos_token": {"content": "<b>"}},
            },
            "<b>",
        ),
    ],
)
def test_kept_bos(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    assert kept_bos(model(tmp_path / "model", **files)) == expected
