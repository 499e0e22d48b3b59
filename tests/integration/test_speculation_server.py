"""Speculative decoding through real servers: the same messages, and what cannot be is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.kit.client import Json, Status, connect_blocking
from tests.kit.server import Server, run_server, start_server

TEXTS = [
    "Tom has a red ball. Lily has a blue hat. Tom has a red ball. Lily has",
    "Once upon a time there was a little dog. Once upon a time there was",
    "One day",
]
ALL_DETAILS: Json = {
    "inputText": True,
    "generatedTokens": True,
    "inputTokens": True,
    "tokenLogprobs": True,
    "tokenRanks": True,
    "topNTokens": 3,
}
PARAMS: dict[str, Json] = {
    "greedy": {"stopping": {"maxNewTokens": 60, "minNewTokens": 60}},
    "to its end": {"stopping": {"maxNewTokens": 150}},
    "details": {"stopping": {"maxNewTokens": 40}, "response": ALL_DETAILS},
    "stop": {"stopping": {"maxNewTokens": 80, "stopSequences": ["they", ". The"]}},
    "penalties": {
        "stopping": {"maxNewTokens": 40, "minNewTokens": 20},
        "decoding": {
            "repetitionPenalty": 1.2,
            "lengthPenalty": {"startIndex": 5, "decayFactor": 1.02},
        },
    },
    "seeded": {
        "method": "SAMPLE",
        "sampling": {"temperature": 0.5, "topK": 20, "seed": 7},
        "stopping": {"maxNewTokens": 60},
    },
}


def rounded(value: Any) -> Any:
    """Without the last digits of logprobs, in which one step may differ from several."""
    if isinstance(value, dict):
        return {
            key: round(item, 3) if key == "logprob" else rounded(item)
            for key, item in value.items()
        }
    return [rounded(item) for item in value] if isinstance(value, list) else value


def answers(server: Server) -> dict[str, Any]:
    """Everything that is said: unary, and each message of every stream."""
    said: dict[str, Any] = {}
    with connect_blocking(server.grpc) as client:
        for name, params in PARAMS.items():
            for number, text in enumerate(TEXTS):
                unary = client.call("Generate", {"requests": [{"text": text}], "params": params})
                stream, error = client.stream({"request": {"text": text}, "params": params})
                assert not isinstance(unary, Status), unary
                assert error is None
                said[f"{name} {number}"] = rounded((unary["responses"], _joined(stream)))
    return said


def _joined(messages: list[Json]) -> list[Json]:
    """A client that is late gets several tokens' text in one message, so only sums are fixed."""
    text = "".join(message.get("text", "") for message in messages)
    tokens = [token for message in messages for token in message.get("tokens", [])]
    return [{"text": text, "tokens": tokens, **messages[-1], "sum": text}]


def metric(server: Server, name: str) -> float:
    _, page = server.get("/metrics")
    (value,) = re.findall(rf"^{name} (\S+)$", page, re.MULTILINE)
    return float(value)


@pytest.fixture(scope="module")
def plain(demo_model_dir: Path) -> dict[str, Any]:
    with run_server(demo_model_dir, "--dtype", "float32", "--threads", "1") as server:
        said = answers(server)
        assert metric(server, "tgi_speculation_draft_count_total") == 0
    return said


@pytest.mark.parametrize("drafts", ["prompt-lookup", "a model"])
def test_the_same_answers_with_drafts(
    demo_model_dir: Path, plain: dict[str, Any], drafts: str
) -> None:
    drafts = drafts if drafts == "prompt-lookup" else str(demo_model_dir)
    flags = ["--dtype", "float32", "--threads", "1", "--speculate", drafts]
    with run_server(demo_model_dir, *flags) as server:
        assert answers(server) == plain
        drafted, accepted = (
            metric(server, f"tgi_speculation_{name}_tokens_total") for name in ("draft", "accepted")
        )
        assert drafted > accepted > (50 if drafts == "prompt-lookup" else 500)


@pytest.mark.slow
def test_the_same_answers_of_two_ranks(demo_model_dir: Path, plain: dict[str, Any]) -> None:
    flags = ["--dtype", "float32", "--threads", "1", "--speculate", "prompt-lookup"]
    with run_server(demo_model_dir, *flags, "--num-shard", "2") as server:
        assert answers(server) == plain
        assert metric(server, "tgi_speculation_accepted_tokens_total") > 50


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--deployment-framework", "hf_transformers"], "engine hf_transformers cannot verify"),
        (["--num-shard", "2", "--speculate", "{demo}"], "a draft model does not go with"),
        (["--speculate", "/nowhere"], "--speculate=/nowhere: .*not found"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    demo_model_dir: Path, tmp_path: Path, flags: list[str], text: str
) -> None:
    given = [flag.format(demo=demo_model_dir) for flag in flags]
    if "--speculate" not in given:
        given += ["--speculate", "prompt-lookup"]
    log = tmp_path / "termination-log"
    server = start_server(demo_model_dir, tmp_path, *given, "--termination-log", str(log))
    assert server.process.wait(60) != 0
    assert re.search(text, server.log())
    assert re.search(text, log.read_text())
