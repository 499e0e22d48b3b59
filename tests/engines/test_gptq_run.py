"""`text-generation-server quantize`: what it writes computes what it has reported."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models import twins
from torch import Tensor
from torch.nn import functional

from tgis.cli.server import main
from tgis.config import parse
from tgis.engines import gptq_run, native
from tgis.engines.base import CacheShape
from tgis.engines.gptq_run import Task, quantise_model
from tgis.engines.gptq_texts import Texts, read_texts
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ConfigError, ModelError
from tgis.quant.gptq import Options

LENGTH = 48
LARGER = {"intermediate_size": 64}  # sizes must fill whole words


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of the kind that the demo model knows."""
    choose = random.Random(0).choice
    sentences = (
        f"{choose(['One day', 'Then', 'In the park'])}, {choose(['Lily', 'Tom', 'a little dog'])}"
        f" {choose(['found', 'saw', 'wanted'])} {choose(['a red ball', 'a big tree', 'his mom'])}."
        for _ in range(150)
    )
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(sentences))
    return path


def command(model: Path, output: Path, text: Path, *more: str) -> int:
    options = ("--samples", "6", "--sample-length", str(LENGTH), "--group-size", "64")
    return main(
        ["quantize", str(model), str(output), "--calibration-file", str(text), *options, *more]
    )


def load(path: Path) -> native.NativeEngine:
    engine = native.load(path, json.loads((path / "config.json").read_text()), torch.float32)
    engine.allocate(CacheShape(1, 96))
    return engine


def logits(engine: native.NativeEngine, ids: list[int]) -> Tensor:
    return engine.forward(StepPlan([Row(0, 0, ids, 0, Want.ALL)]))


def perplexity(engine: native.NativeEngine, windows: list[Tensor]) -> float:
    losses = [
        functional.cross_entropy(logits(engine, window.tolist())[:-1], window[1:])
        for window in windows
    ]
    return float(torch.stack(losses).mean().exp())


def reported(output: str) -> list[float]:
    lines = [line for line in output.splitlines() if line.startswith("Perplexity")]
    return [float(line.split()[-1]) for line in lines]


def test_the_result_computes_what_was_reported(
    demo_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(demo_model_dir, out, text, "--act-order", "--no-sym") == 0
    before, after = reported(capsys.readouterr().out)
    held_out = read_texts(demo_model_dir, text, 6, LENGTH).held_out  # in bfloat16, as stored
    assert perplexity(load(demo_model_dir), held_out) == pytest.approx(before, rel=3e-3)
    assert perplexity(load(out), held_out) == pytest.approx(after, rel=3e-3)
    assert before != after == pytest.approx(before, rel=0.1)
    assert {file.name for file in out.iterdir()} >= {"tokenizer.json", "quantize_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["desc_act"]) == ("gptq", 4, True)
    # The same weights without what config.json says of them: the older file says it too.
    (out / "config.json").write_text((demo_model_dir / "config.json").read_text())
    assert gptq_run.resolve(parse([f"--model-name={out}"], {})).quantization == config


def test_a_run_that_was_interrupted_goes_on(
    demo_model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    changes = {**LARGER, "vocab_size": 2048, "hidden_size": 64, "num_attention_heads": 4}
    twins.save_checkpoint(source, twins.llama(**changes))
    shutil.copy(demo_model_dir / "tokenizer.json", source)
    command(source, whole, text)
    names: list[str] = []
    quantise = gptq_run.quantise_gptq

    def watched(weight: Tensor, hessian: Tensor, options: Options, name: str) -> Any:
        names.append(name)
        if name.startswith("model.layers.1.") and len(names) < 15:
            raise KeyboardInterrupt
        return quantise(weight, hessian, options, name)

    monkeypatch.setattr(gptq_run, "quantise_gptq", watched)
    assert command(source, out, text) == 130
    assert "interrupted; what is done is kept in" in capsys.readouterr().out
    assert not out.exists()
    assert command(source, out, text, "--no-sym") == 2
    assert "out.partial is half made from another model, text or options" in capsys.readouterr().err
    names[:] = ["-"] * 15
    assert command(source, out, text) == 0
    assert {name.split(".")[2] for name in names[15:]} == {"1", "2"}
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


FAMILIES = {
    "llama-biases": LARGER,
    "qwen2": LARGER,
    "gpt_neox": LARGER,
    "gpt2": {},
    "gpt_bigcode": {},
    "bloom": {},
    "falcon-7b": {},
    "falcon-40b": {},
    "mpt": {},
    "opt": {"ffn_dim": 64},
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in {"llama-biases", "gpt2", "falcon-40b"}
        else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = twins.CONFIGS[name].__class__(**{**twins.CONFIGS[name].to_dict(), **FAMILIES[name]})
    source, out = tmp_path / "source", tmp_path / "out"
    twins.save_checkpoint(source, config)
    windows = [torch.tensor(twins.random_ids(seed, 40)) for seed in range(6)]
    monkeypatch.setattr(gptq_run, "read_texts", lambda *_: Texts(windows[:5], windows[5:]))
    lines: list[str] = []
    task = Task(out, Path("unused"), Options(bits=8, group_size=16))
    quantise_model(parse([f"--model-name={source}"], {}), task, lines.append)
    before, after = reported("\n".join(lines))
    assert perplexity(load(source), windows[5:]) == pytest.approx(before, rel=1e-3)
    assert perplexity(load(out), windows[5:]) == pytest.approx(after, rel=1e-3)
    ids = windows[0].tolist()
    exact, ours = logits(load(source), ids).clone(), logits(load(out), ids)
    assert 0 < (ours - exact).norm() / exact.norm() < 0.1


def refused(
    model: Path, output: Path, text: Path, length: int = 16, options: Options | None = None
) -> str:
    task = Task(output, text, options or Options(), 4, length)
    with pytest.raises((ConfigError, ModelError)) as caught:
        quantise_model(parse([f"--model-name={model}"], {}), task, print)
    message = str(caught.value)
    assert "\n" not in message
    assert not output.exists() or output == model
    return message


def test_refusals(demo_model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "OUTPUT_DIR" in refused(demo_model_dir, demo_model_dir, text)
    assert "No such file" in refused(demo_model_dir, out, tmp_path / "none.txt")
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    assert "tokens are too few: the last 10% are held out" in refused(demo_model_dir, out, short)
    short.write_bytes(b"\xff\xfe\xff")
    assert "it is not UTF-8 text" in refused(demo_model_dir, out, short)

    def variant(name: str, **changes: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in demo_model_dir.iterdir():
            (path / file.name).symlink_to(file)
        config = json.loads((demo_model_dir / "config.json").read_text())
        (path / "config.json").unlink()
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        return path

    quantised = variant("quantised", quantization_config={"quant_method": "awq"})
    assert "are quantised already, by awq" in refused(quantised, out, text)
    other = variant("other", model_type="t5", is_encoder_decoder=True)
    assert "models of type t5 cannot be quantised by this command" in refused(other, out, text)
