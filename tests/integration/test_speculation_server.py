"""Speculative decoding through real servers: the same messages, and what cannot be is refused."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.kit.client import Json, Status, connect_blocking
from tests.kit.server import Server, run_server, start_server

TEXTS = [
    "Tom has a red ball. Lily has a blue hat. Tom has a red ball. Lily has",
    "Once upon a time there was a little dog. Once upon a time there was",
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


def answers(server: Server, names: Iterable[str] = tuple(PARAMS)) -> dict[str, Any]:
    """Everything that is said, unary and in streams."""
    said: dict[str, Any] = {}
    with connect_blocking(server.grpc) as client:
        for name in names:
            params = PARAMS[name]
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
    return [{**messages[-1], "text": text, "tokens": tokens}]


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


@pytest.fixture
def small_model(demo_model_dir: Path, tmp_path: Path) -> Path:
    """The first layer of the demo model, as a model: quick, and rarely right."""
    path = tmp_path / "small"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(demo_model_dir / name, path / name)
    config = json.loads((demo_model_dir / "config.json").read_text()) | {"num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor
        for name, tensor in load_file(demo_model_dir / "model.safetensors").items()
        if ".layers." not in name or ".layers.0." in name
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_the_same_answers_by_prompt_lookup(demo_model_dir: Path, plain: dict[str, Any]) -> None:
    flags = ["--dtype", "float32", "--threads", "1", "--speculate", "prompt-lookup"]
    with run_server(demo_model_dir, *flags) as server:
        assert answers(server) == plain
        drafted, accepted = (
            metric(server, f"tgi_speculation_{name}_tokens_total") for name in ("draft", "accepted")
        )
        assert drafted > accepted > 30


@pytest.mark.slow
def test_the_same_answers_by_a_draft_model(
    demo_model_dir: Path, small_model: Path, plain: dict[str, Any]
) -> None:
    flags = ["--dtype", "float32", "--threads", "1", "--speculate", str(small_model)]
    with run_server(demo_model_dir, *flags) as server:
        assert answers(server) == plain
        assert metric(server, "tgi_speculation_draft_tokens_total") > 0


@pytest.mark.slow
def test_the_same_answers_of_two_ranks(demo_model_dir: Path, plain: dict[str, Any]) -> None:
    flags = ["--dtype", "float32", "--threads", "1", "--speculate", "prompt-lookup"]
    with run_server(demo_model_dir, *flags, "--num-shard", "2") as server:
        said = answers(server, ["greedy"])
        assert said == {name: plain[name] for name in said}
        assert metric(server, "tgi_speculation_draft_tokens_total") > 0


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
