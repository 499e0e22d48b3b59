"""convert-to-onnx: what it writes, what it refuses, and that it leaves nothing half done."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra tgis[ort] is not installed")
pytest.importorskip("onnxscript", reason="the extra tgis[ort] is not installed")

from tests.engines.hf_models import CONFIGS, save_model
from tests.engines.onnx_files import CONFIGS as TINY
from tests.engines.onnx_files import export, joining_and_leaving, load

from tgis.engines import onnx_export
from tgis.engines.onnx_export import Options
from tgis.errors import ConfigError, ModelError
from tgis.hub import onnx_files

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("single_thread")]
FAMILIES = ("gpt2", "opt", "bloom", "gemma2", "bart")
BATCHING = {"bart": "aligned"}  # its graphs number columns, not tokens


def only_the_model(tmp_path: Path) -> bool:
    return [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_target_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for target in (tmp_path / "taken", tmp_path / "taken" / "file"):
        with pytest.raises(ConfigError, match=r"TARGET .* exists and is not an empty directory"):
            export(tmp_path, target)


def test_a_provider_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--provider=Best: .*; it has .*CPUExecutionProvider"):
        export(tmp_path, tmp_path / "onnx", Options(provider="Best"))


@pytest.mark.parametrize("library", ["onnxruntime", "onnx_ir", "onnxscript"])
def test_a_library_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"convert-to-onnx needs .*: pip install 'tgis\[ort\]'"):
        export(tmp_path, tmp_path / "onnx")


@pytest.mark.parametrize("name", ["mamba", "rwkv", "qwen3_next"])
def test_models_that_keep_more_than_keys_and_values(tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "model", CONFIGS[name])
    with pytest.raises(ModelError, match=r"cannot be exported: its cache .* is not of keys and"):
        export(tmp_path / "model", tmp_path / "onnx")
    assert only_the_model(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    save_model(tmp_path / "model", TINY["llama"])
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot write ONNX files to .*: "):
        export(tmp_path / "model", tmp_path / "file" / "onnx")


def test_a_model_that_torch_cannot_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("outer") from ValueError("that dimension\nis fixed")

    monkeypatch.setattr(torch.onnx, "export", fail)
    save_model(tmp_path / "model", TINY["llama"])
    with pytest.raises(ModelError, match=r"model.onnx: ValueError: that dimension is fixed$"):
        export(tmp_path / "model", tmp_path / "onnx")
    assert only_the_model(tmp_path)


@pytest.mark.slow
def test_files_that_are_not_the_model_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", TINY["llama"])
    trace, save = onnx_export._trace, onnx_export._save
    traced: list[Any] = []

    def remember(part: Any) -> Any:
        traced.append(part.module.model)
        return trace(part)

    def save_and_change(*call: Any) -> None:
        save(*call)
        with torch.no_grad():
            traced[0].lm_head.weight[3] *= 1.05

    monkeypatch.setattr(onnx_export, "_trace", remember)
    monkeypatch.setattr(onnx_export, "_save", save_and_change)
    with pytest.raises(ModelError, match="the files give other scores than the model"):
        export(tmp_path / "model", tmp_path / "onnx")
    assert only_the_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "model", CONFIGS[name])
    export(tmp_path / "model", tmp_path / "onnx")
    engine = load(tmp_path / "onnx")
    assert engine._batching == BATCHING.get(name, "padded")
    joining_and_leaving(model, engine)


@pytest.mark.slow
def test_the_command_with_all_its_options(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", TINY["t5"])
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    code = "import sys; from tgis.cli.server import main; sys.exit(main(sys.argv[1:]))"
    words = ["convert_to_onnx", str(tmp_path / "model"), str(tmp_path / "onnx")]
    words += ["--merge_graphs", "--optimize", "--provider", "CPUExecutionProvider"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "Provider: CPUExecutionProvider",
        "Options: merge_graphs=True, optimize=True",
        "Model type: t5",
    ]
    assert lines[-1] == f"Saved the ONNX model to {tmp_path / 'onnx'}"
    found = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert found == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        onnx_files.ENCODER,
        onnx_files.MERGED,
    }
    joining_and_leaving(model, load(tmp_path / "onnx"))


@pytest.mark.slow
def test_weights_beyond_a_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_MOST_INSIDE", 1000)
    model = save_model(tmp_path / "model", TINY["llama"])
    export(tmp_path / "model", tmp_path / "onnx", Options(optimize=True, merge_graphs=True))
    assert (tmp_path / "onnx" / f"{onnx_files.SINGLE}_data").stat().st_size > 30_000
    assert (tmp_path / "onnx" / onnx_files.SINGLE).stat().st_size < 130_000
    joining_and_leaving(model, load(tmp_path / "onnx"))
