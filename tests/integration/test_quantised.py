"""Quantised weights through real servers."""

import json
from pathlib import Path

import pytest
import torch
from tests.kit.client import Json, Status, connect_blocking
from tests.kit.server import Server, run_server

from tgis.cli.server import main
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want

PROMPT = "Once upon a time there was a little dog"
NEW_TOKENS = 12


def generate(server: Server) -> str:
    request: Json = {
        "requests": [{"text": PROMPT}],
        "params": {"method": "GREEDY", "stopping": {"maxNewTokens": NEW_TOKENS}},
    }
    with connect_blocking(server.grpc) as client:
        answer = client.call("Generate", request)
    assert not isinstance(answer, Status), answer
    return str(answer["responses"][0]["text"])


def expected(path: Path, quantize: str | None) -> str:
    """What the engine alone generates."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    engine = native.load(path, config, torch.float32, quantize=quantize)
    engine.allocate(CacheShape(1, 64))
    ids = tokenizer.encode(PROMPT).ids
    prompt = len(ids)
    for _ in range(NEW_TOKENS):
        logits = engine.forward(StepPlan([Row(0, 0, ids, 0, Want.LAST)]))
        ids.append(int(logits.argmax()))
    return str(tokenizer.decode(ids[prompt:]))


@pytest.mark.parametrize("quantize", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_weights_quantised_while_loading(demo_model_dir: Path, quantize: str) -> None:
    with run_server(demo_model_dir, "--dtype-str", "float32", env={"QUANTIZE": quantize}) as server:
        assert generate(server).strip() == expected(demo_model_dir, quantize).strip()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_checkpoint_of_our_command(demo_model_dir: Path, tmp_path: Path, ranks: str) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Lily and Tom went to the park. They saw a big red ball. " * 80)
    options = ("--samples", "4", "--sample-length", "64", "--group-size", "32", "--act-order")
    command = ["quantize", str(demo_model_dir), str(out), "--calibration-file", str(text)]
    assert main([*command, *options]) == 0
    flags = ("--dtype-str", "float32", "--quantize", "gptq", "--num-shard", ranks)
    with run_server(out, *flags) as server:
        assert generate(server).strip() == expected(out, None).strip()
        assert "Weights are quantised: " in server.log()


@pytest.mark.slow
def test_a_model_that_is_not_stored_so_is_refused(demo_model_dir: Path) -> None:
    message = "Cannot load `gptq` weight, make sure the model is already quantized"
    with (
        pytest.raises(RuntimeError, match=message),
        run_server(demo_model_dir, "--quantize", "gptq"),
    ):
        pass
