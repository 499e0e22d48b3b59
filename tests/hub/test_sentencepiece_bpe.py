"""SentencePiece BPE models as fast tokenizers, against the SentencePiece library itself."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from tgis.errors import ModelError
from tgis.hub.sentencepiece_bpe import build_bpe

WORDS = "the quick brown fox jumps over lazy dogs and then they there other mother's naïve café"
TEXTS = [
    "the other dogs",
    "  two  spaces and   three ",
    "line\n\tbreak",
    "日本 😀 over",
    "",
    " ",
    "a [TAG] b[TAG][TAG]",
]


def train(directory: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Put a `tokenizer.model` into the directory; training is deterministic."""
    rng, model = random.Random(0), io.BytesIO()
    lines = [" ".join(rng.choices(WORDS.split(), k=8)) for _ in range(300)]
    options = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[TAG]"],
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
        **options,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def settings(directory: Path, name: str = "tokenizer_config", **content: Any) -> None:
    (directory / f"{name}.json").write_text(json.dumps(content))


def build(directory: Path) -> Tokenizer:
    tokenizer = build_bpe(directory)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_encodes_and_decodes_as_sentencepiece_does(tmp_path: Path, prefix: bool) -> None:
    oracle = train(tmp_path, add_dummy_prefix=prefix)
    settings(tmp_path, add_bos_token=False)
    tokenizer, rng = build(tmp_path), random.Random(1)
    letters = [*"aeht  nors'", "ï", "é", "本"]
    texts = [text for text in TEXTS if "TAG" not in text]
    texts += ["".join(rng.choices(letters, k=rng.randrange(20))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == oracle.encode(text), repr(text)
        assert tokenizer.decode(ids) == oracle.decode(ids) == text


def test_user_defined_symbols_are_whole_tokens(tmp_path: Path) -> None:
    oracle = train(tmp_path)
    encoding = build(tmp_path).encode("the[TAG]dogs")
    assert encoding.tokens[0] == "<s>"
    assert encoding.ids.count(oracle.piece_to_id("[TAG]")) == 1
    assert build(tmp_path).decode(encoding.ids) == "the[TAG] dogs"  # as a text of its own


@pytest.mark.parametrize(
    ("content", "first", "last"),
    [
        ({}, "<s>", "▁dogs"),
        ({"add_bos_token": False}, "▁the", "▁dogs"),
        ({"add_eos_token": True}, "<s>", "</s>"),
        ({"bos_token": {"content": "</s>"}}, "</s>", "▁dogs"),
    ],
)
def test_special_tokens_around_a_text(
    tmp_path: Path, content: dict[str, Any], first: str, last: str
) -> None:
    train(tmp_path)
    settings(tmp_path, **content)
    tokens = build(tmp_path).encode("the dogs").tokens
    assert (tokens[0], tokens[-1]) == (first, last)


def test_without_legacy_only_the_text_gets_a_space(tmp_path: Path) -> None:
    train(tmp_path)
    assert build(tmp_path).encode("</s>the").tokens == ["<s>", "</s>", "▁the"]
    settings(tmp_path, legacy=False)
    assert build(tmp_path).encode("</s>the").tokens == ["<s>", "</s>", "the"]
    assert build(tmp_path).encode("the").tokens == ["<s>", "▁the"]


def test_tokens_added_later(tmp_path: Path) -> None:
    size = train(tmp_path).get_piece_size()
    token = {"content": "<|end|>", "special": True, "normalized": False}
    settings(tmp_path, added_tokens_decoder={"1": {"content": "<s>"}, str(size + 1): token})
    settings(tmp_path, "added_tokens", **{"<pad>": size})
    tokenizer = build(tmp_path)
    assert tokenizer.encode("<pad>the<|end|>").ids[-1] == size + 1
    assert tokenizer.token_to_id("<pad>") == size
    assert tokenizer.decode([size + 1, size]) == "<pad>"
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(ModelError, match=f"token {size + 1} cannot be added"):
        build_bpe(tmp_path)


def test_other_models_are_left_to_others(tmp_path: Path) -> None:
    train(tmp_path, model_type="unigram", vocab_size=300)
    assert build_bpe(tmp_path) is None
