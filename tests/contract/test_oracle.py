"""The oracle itself is held against outputs that were recorded from TGIS's own server."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.contract.golden import (
    LOGPROB_TOLERANCE,
    candidates_bind,
    check_rank,
    check_top,
    is_on_edge,
    recorded_rows,
    request_of,
)
from tests.contract.oracle import Limits, Oracle
from tests.contract.oracle.request import parse
from tests.contract.oracle.text import Text, find_stop

WIDE = Limits(max_sequence_length=512)


@cache
def oracle_of(directory: Path) -> Oracle:
    return Oracle(directory, WIDE)


def check_row(oracle: Oracle, row: dict[str, Any]) -> None:
    params = parse(request_of(row), WIDE)
    ids = oracle.text.encode(row["text"], params.truncate)
    steps = oracle.run(ids, params).steps
    assert [step.token_id for step in steps] == [token["id"] for token in row["tokens"]]
    assert ids == [token_id for token_id, _, _ in row["input"]]
    if is_on_edge(row):
        return
    for step, token in zip(steps, row["tokens"], strict=True):
        assert step.details.logprob == pytest.approx(token["logprob"], abs=LOGPROB_TOLERANCE)
        check_rank(step.details.rank, token["rank"])
        if candidates_bind(row):
            check_top(step.details.top, token["top"])
    inputs = oracle.input_details(ids, params)
    for details, (_, logprob, rank) in zip(inputs, row["input"], strict=True):
        expected = float("nan") if logprob is None else logprob
        assert details.logprob == pytest.approx(expected, abs=LOGPROB_TOLERANCE, nan_ok=True)
        assert details.rank == rank


@pytest.mark.parametrize("model", ["stories260K", "stories260K-eos"])
def test_equals_tgis(shared_dir: Path, model: str) -> None:
    rows = recorded_rows(shared_dir, model)
    assert len(rows) == 78
    for row in rows:
        check_row(oracle_of(shared_dir / "models" / model), row)


def test_equals_tgis_encoder_decoder(shared_dir: Path) -> None:
    rows = recorded_rows(shared_dir, "tiny-t5")
    assert len(rows) == 32
    for row in rows:
        check_row(oracle_of(shared_dir / "models" / "tiny-t5"), row)


@pytest.mark.parametrize(
    ("text", "num_new", "stops", "found"),
    [
        ("a little", 7, ["little"], ("little", 2, 8)),
        ("a little", 7, ["litt"], ("litt", 2, 6)),
        ("a little", 2, ["litt"], None),  # completed by an older token
        ("a little", 2, ["little", "le"], ("little", 2, 8)),  # the first in the request
        ("tatata", 6, ["ta"], ("ta", 4, 6)),  # the last of its matches
        ("tatata", 1, ["tata"], ("tata", 2, 6)),
        ("little", 0, ["little"], None),  # a token without text
        ("é", 2, ["é"], ("é", 0, 2)),  # counted in bytes
        ("", 0, ["x"], None),
    ],
)
def test_find_stop(
    text: str, num_new: int, stops: list[str], found: tuple[str, int, int] | None
) -> None:
    assert find_stop(text.encode(), num_new, stops) == found


@pytest.mark.parametrize(
    ("name", "causal", "word", "text"),
    [
        ("llama2", True, "café", " café"),
        ("t5-small", True, "café", " café"),
        ("bert-uncased", True, "café", " cafe"),
        ("gpt2", True, " café", " café"),
        ("gpt2", True, "café", "café"),
        ("starcoder", True, " café", " café"),
        ("t5-small", False, "café", "café"),
    ],
)
def test_leading_space(shared_dir: Path, name: str, causal: bool, word: str, text: str) -> None:
    tokenizer = Text(shared_dir / "tokenizers" / name, causal, show_special=False)
    ids = tokenizer.tokenizer.encode(word, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_a_character_waits_for_its_last_byte(shared_dir: Path) -> None:
    tokenizer = Text(shared_dir / "tokenizers" / "gpt2", True, show_special=False)
    ids = tokenizer.encode("a😀b")
    texts = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    assert texts == ["a", "a", "a😀", "a😀b"]
