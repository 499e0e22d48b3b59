"""The judge is judged: a right stream passes, every kind of wrong one does not."""

import copy
from collections.abc import Callable

import pytest
from tests.contract.cases import Json
from tests.contract.compare import (
    difference,
    error_difference,
    outcome_difference,
    stream_difference,
)
from tests.kit.client import Status

REQUEST = {
    "request": {"text": "Tim"},
    "params": {"response": {"inputText": True, "inputTokens": True, "generated_tokens": True}},
}
UNARY = {
    "inputTokenCount": 2,
    "inputTokens": [{"text": "<s>", "logprob": "NaN"}, {"text": "Tim", "logprob": -2.5}],
    "generatedTokenCount": 3,
    "text": "Tim ran off",
    "tokens": [{"text": " ran", "logprob": -0.5}, {"text": " of"}, {"text": "f", "rank": 2}],
    "stopReason": "STOP_SEQUENCE",
    "stopSequence": "ff",
    "seed": "7",
}
STREAM = [
    {"inputTokenCount": 2, "seed": "7", "text": "Tim"},
    {"inputTokenCount": 2, "inputTokens": UNARY["inputTokens"]},
    {"generatedTokenCount": 1, "text": " ra", "tokens": UNARY["tokens"][:1]},
    {"generatedTokenCount": 2, "tokens": UNARY["tokens"][1:2]},
    {
        "generatedTokenCount": 3,
        "text": "n off",
        "tokens": UNARY["tokens"][2:],
        "stopReason": "STOP_SEQUENCE",
        "stopSequence": "ff",
        "seed": "7",
    },
]

Change = Callable[[list[Json]], object]

WRONG: dict[str, Change] = {
    "no opening": lambda s: s.pop(0),
    "no input tokens": lambda s: s.pop(1),
    "other input tokens": lambda s: s[1]["inputTokens"].pop(),
    "other input count": lambda s: s[0].update(inputTokenCount=3),
    "seed missing at the start": lambda s: s[0].pop("seed"),
    "count at the start": lambda s: s[0].update(generatedTokenCount=1),
    "input text missing": lambda s: s[0].pop("text"),
    "nothing after the opening": lambda s: s.__delitem__(slice(2, None)),
    "a token lost": lambda s: s.pop(3),
    "a token twice": lambda s: s.insert(3, copy.deepcopy(s[3])),
    "two tokens in a message": lambda s: s[3]["tokens"].append({"text": "x"}),
    "tokens out of order": lambda s: s.insert(2, s.pop(3)),
    "count not cumulative": lambda s: s[3].update(generatedTokenCount=1),
    "stop reason too soon": lambda s: s[3].update(stopReason="MAX_TOKENS"),
    "message after the end": lambda s: s.append({"generatedTokenCount": 4, "tokens": [{}]}),
    "no stop reason": lambda s: s[-1].pop("stopReason"),
    "other stop reason": lambda s: s[-1].update(stopReason="MAX_TOKENS"),
    "other stop sequence": lambda s: s[-1].update(stopSequence="f"),
    "seed in the middle": lambda s: s[3].update(seed="7"),
    "seed missing at the end": lambda s: s[-1].pop("seed"),
    "input count in the body": lambda s: s[2].update(inputTokenCount=2),
    "other text": lambda s: s[2].update(text=" r"),
    "logprob beyond rounding": lambda s: s[2]["tokens"][0].update(logprob=-0.5004),
    "field too many": lambda s: s[2]["tokens"][0].update(rank=1),
}


def test_a_right_stream_passes() -> None:
    assert stream_difference(STREAM, REQUEST, UNARY) is None


def test_a_separator_is_only_in_the_unary_text() -> None:
    unary = UNARY | {"text": "Tim\n\n ran off"}
    assert stream_difference(STREAM, REQUEST, unary, "\n\n") is None
    assert stream_difference(STREAM, REQUEST, unary) is not None


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_stream_does_not(change: Change) -> None:
    stream = copy.deepcopy(STREAM)
    change(stream)
    assert stream_difference(stream, REQUEST, UNARY) is not None


def test_a_message_without_token_and_text_is_wrong() -> None:
    request = {"request": {"text": "Tim"}}
    unary = {"inputTokenCount": 2, "generatedTokenCount": 2, "text": "a", "stopReason": "EOS_TOKEN"}
    end = {"generatedTokenCount": 2, "text": "a", "stopReason": "EOS_TOKEN"}
    assert stream_difference([{"inputTokenCount": 2}, end], request, unary) is None
    silent = [{"inputTokenCount": 2}, {"generatedTokenCount": 1}, end]
    assert stream_difference(silent, request, unary) is not None


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (1.0004, 1.0, True),
        (1.0006, 1.0, False),
        (0.0, 1e-10, True),
        (1e-8, 0.0, False),
        ("NaN", "NaN", True),
        (-1.0, "NaN", False),
        ([1], [1, 2], False),
        ({}, {"a": 0}, False),
        ({"a": 0}, {}, False),
        ("1", 1, False),
    ],
)
def test_values(found: object, expected: object, equal: bool) -> None:
    assert (difference(found, expected) is None) == equal


def test_errors() -> None:
    expected = {"code": "INVALID_ARGUMENT", "message": "no"}
    assert error_difference(Status("INVALID_ARGUMENT", "no"), expected) is None
    assert error_difference(Status("INVALID_ARGUMENT", "not"), expected) is not None
    assert error_difference(Status("UNKNOWN", "no"), expected) is not None
    assert error_difference(Status("INVALID_ARGUMENT", "not"), expected | {"exact": False}) is None
    assert outcome_difference({}, {"error": expected}) is not None
    assert outcome_difference(Status("UNKNOWN", "no"), {"response": {}}) is not None
