"""Quantised checkpoints that cannot be served: refused in a line, before weights are read."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import quantised, twins
from torch import Tensor

from tgis.engines import native
from tgis.errors import ConfigError, ModelError

LAYER = "model.layers.0.self_attn"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("floats")
    twins.save_checkpoint(path, twins.CONFIGS["llama"])
    return path


@pytest.fixture(scope="module")
def stored(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with groups of 16 input features in any order, and in AWQ's layout."""
    root = tmp_path_factory.mktemp("stored")
    return {
        name: quantised.make_pair(floats, root / name, method, bits)[0]
        for name, method, bits in (("gptq", "gptq", 4), ("gptq-8", "gptq", 8), ("awq", "awq", 4))
    }


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def nothing(_: Tensors) -> None:
    """The tensors stay as they are."""


@pytest.mark.parametrize(
    ("name", "config", "change", "text"),
    [
        ("gptq", {"bits": 8}, nothing, r"\.qweight of shape .* does not hold the .*bits says"),
        ("gptq-8", {"bits": 4}, nothing, r"\.qweight of shape .* does not hold the .*bits says"),
        ("gptq", {"bits": 3}, nothing, r"quantization_config: bits = 3 is not supported"),
        ("awq", {"bits": 8}, nothing, r"quantization_config: bits = 8 is not supported"),
        ("gptq", {}, without(f"{LAYER}.q_proj.g_idx"), rf"{LAYER}.q_proj.g_idx does not exist"),
        ("gptq", {}, without(f"{LAYER}.o_proj.scales"), rf"{LAYER}.o_proj.scales does not exist"),
        ("awq", {}, without(f"{LAYER}.o_proj.qzeros"), rf"{LAYER}.o_proj.qzeros does not exist"),
        ("gptq", {"group_size": 32}, nothing, r"\.scales has \d+ groups, but .*group_size = 32"),
        ("awq", {"group_size": 64}, nothing, r"\.scales has \d+ groups, but .*group_size = 64"),
        ("awq", {"version": "gemv"}, nothing, r"version = 'gemv' is not supported"),
        ("gptq", {"quant_method": "exl2"}, nothing, r"quant_method = 'exl2' is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, nothing, r"checkpoint_format = 'marlin'"),
    ],
)
def test_before_a_weight_is_read(
    stored: dict[str, Path],
    tmp_path: Path,
    name: str,
    config: dict[str, Any],
    change: Callable[[Tensors], None],
    text: str,
) -> None:
    path = tmp_path / "changed"
    shutil.copytree(stored[name], path)
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] |= config
    (path / "config.json").write_text(json.dumps(values))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    read: list[int] = []
    with pytest.raises(ModelError, match=text) as refused:
        native.load(path, values, torch.float32, lambda done, _: read.append(done))
    assert "\n" not in str(refused.value)
    assert not any(read)


def test_parts_that_are_computed_together(stored: dict[str, Path], tmp_path: Path) -> None:
    """Queries, keys and values read the same input, each with an order of its own."""
    path = tmp_path / "changed"
    shutil.copytree(stored["gptq"], path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{LAYER}.k_proj.g_idx"] = tensors[f"{LAYER}.k_proj.g_idx"].flip(0)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    text = rf"{LAYER}.q_proj and {LAYER}.k_proj are computed together, but their g_idx differ"
    with pytest.raises(ModelError, match=text):
        native.load(path, json.loads((path / "config.json").read_text()), torch.float32)


@pytest.mark.parametrize(
    ("name", "quantize", "text"),
    [
        ("gptq", "awq", "QUANTIZE = awq: the model's weights are quantised already, by"),
        ("awq", "int4", "QUANTIZE = int4: the model's weights are quantised already, by"),
        (None, "gptq", "Cannot load `gptq` weight, make sure the model is already quantized, or"),
        (None, "int3", "QUANTIZE = int3: not supported by this version"),
        (None, "bitsandbytes", r"QUANTIZE = bitsandbytes: .* pip install 'tgis\[bitsandbytes\]'"),
    ],
)
def test_settings(
    floats: Path,
    stored: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    quantize: str,
    text: str,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    path = floats if name is None else stored[name]
    read: list[int] = []
    with pytest.raises((ConfigError, ModelError), match=text):
        native.load(
            path,
            json.loads((path / "config.json").read_text()),
            torch.float32,
            lambda done, _: read.append(done),
            quantize=quantize,
        )
    assert not any(read)
