"""Draft models are found and compared before anything heavy is started; refusals name the cause."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tgis.config import SERVE, Config, parse
from tgis.demo import model_dir
from tgis.errors import ConfigError
from tgis.hub.draft import resolve_draft


def config(drafts: str, *flags: str) -> Config:
    return parse(["--speculate", drafts, *flags], {}, SERVE)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return shutil.copytree(model_dir(), tmp_path / "small", copy_function=shutil.copy)


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path.chmod(0o644)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("drafts", ["off", "prompt-lookup"])
def test_words_name_no_model(tmp_path: Path, drafts: str) -> None:
    assert resolve_draft(config(drafts), model_dir(), tmp_path) is None


def test_a_model_of_the_same_vocabulary(small: Path, tmp_path: Path) -> None:
    files = resolve_draft(config(str(small)), model_dir(), tmp_path)
    assert files is not None
    assert files.path == str(small)
    assert files.model_type == "llama"


def refusal(small: Path | str, tmp_path: Path, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_draft(config(str(small), *flags), model_dir(), tmp_path)
    text = str(caught.value)
    assert text.startswith(f"--speculate={small}: ")
    assert text.isprintable()
    return text


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "not found" in refusal("nobody/nothing", tmp_path)


def test_another_vocabulary(small: Path, tmp_path: Path) -> None:
    def swap(values: dict[str, Any]) -> None:
        vocab = values["model"]["vocab"]
        one, other = list(vocab)[300:302]
        vocab[one], vocab[other] = vocab[other], vocab[one]

    change(small / "tokenizer.json", swap)
    assert re.search(r"2 of its \d+ have other ids", refusal(small, tmp_path))


def test_a_smaller_vocabulary(small: Path, tmp_path: Path) -> None:
    def drop(values: dict[str, Any]) -> None:
        vocab = values["model"]["vocab"]
        for token in list(vocab)[-3:]:
            del vocab[token]

    change(small / "tokenizer.json", drop)
    assert "it lacks 3" in refusal(small, tmp_path)


def test_a_model_with_an_encoder(small: Path, tmp_path: Path) -> None:
    edit = {"model_type": "t5", "is_encoder_decoder": True, "decoder_start_token_id": 0}
    change(small / "config.json", lambda values: values.update(edit))
    assert "has an encoder" in refusal(small, tmp_path)


def test_a_model_beside_one_that_is_split(small: Path, tmp_path: Path) -> None:
    assert "num_shard = 2; prompt-lookup does" in refusal(small, tmp_path, "--num-shard", "2")
