"""Checkpoints with quantised weights, made value by value, and what they stand for."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tgis.quant import grouped
from tgis.quant.grouped import dequantise

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SIZE = 16  # input features of a group
_OTHERS = re.compile(r"norm|ln_|relative_attention_bias|\.wo\.")


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a stored tensor is the weight of a layer in a block."""
    in_block = re.search(r"\.\d+\.", f".{name}") and name.endswith(".weight")
    return bool(in_block) and tensor.dim() == 2 and not _OTHERS.search(name)


def _words(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """int64 [rows, n] -> int32 [rows, n x bits / 32], filled up with zeros."""
    per_word = 32 // bits
    filled = functional.pad(values, (0, -values.shape[1] % per_word))
    parts = filled.view(len(values), -1, per_word)[..., list(order)]
    packed = sum(parts[..., j] << (bits * j) for j in range(per_word))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def quantise(matrix: Tensor, method: str, bits: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A weight [out, in] -> its tensors, and the weight that they stand for."""
    out, features = matrix.shape
    top = 2**bits - 1
    group = torch.arange(features) // SIZE
    if method == "gptq":  # another order, the same for layers of the same width
        order = torch.randperm(features, generator=torch.Generator().manual_seed(seed))
        group = group[order]
    groups = int(group.max()) + 1
    scale, zero = torch.zeros(groups, out), torch.zeros(groups, out)
    for g in range(groups):
        part = matrix[:, group == g]
        low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
        scale[g] = ((high - low) / top).half().float()
        zero[g] = (-low / scale[g]).round().clamp(1, top)
    q = ((matrix.T / scale[group]).round() + zero[group]).clamp(0, top)
    stands_for = (scale[group] * (q - zero[group])).T.contiguous()
    q, zero = q.long(), zero.long()
    natural = tuple(range(32 // bits))
    if method == "awq":
        tensors = {"qweight": _words(q, bits, AWQ_ORDER), "qzeros": _words(zero, bits, AWQ_ORDER)}
    else:
        tensors = {
            "qweight": _words(q.T, bits, natural).T.contiguous(),
            "qzeros": _words(zero - 1, bits, natural),
            "g_idx": group.to(torch.int32),
        }
    return {**tensors, "scales": scale.half()}, stands_for


def make_pair(source: Path, target: Path, method: str, bits: int) -> tuple[Path, Path]:
    """A quantised checkpoint, and one of floats that should compute the same."""
    transposed = _is_transposed(json.loads((source / "config.json").read_text()))

    def replaced(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not is_linear(name, tensor):
            return {name: tensor}, {name: tensor}
        matrix = tensor.T if transposed else tensor
        if method == "awq" and matrix.shape[0] % 8:
            return {name: tensor}, {name: tensor}
        tensors, stands_for = quantise(matrix.float(), method, bits, matrix.shape[1])
        prefix = name.removesuffix("weight")
        same = stands_for.T.contiguous() if transposed else stands_for
        return {prefix + part: t for part, t in tensors.items()}, {name: same}

    scheme = {"quant_method": method, "bits": bits, "group_size": SIZE, "version": "gemm"}
    return (
        _write(source, target / "quantised", lambda n, t: replaced(n, t)[0], scheme),
        _write(source, target / "floats", lambda n, t: replaced(n, t)[1], None),
    )


def make_floats(source: Path, target: Path, bits: int, size: int) -> Path:
    """A checkpoint of what weights stand for that `quant.grouped` quantises; heads have 8 bits."""
    transposed = _is_transposed(json.loads((source / "config.json").read_text()))

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name in ("lm_head.weight", "embed_out.weight"):
            return {name: dequantise(grouped.quantise(tensor, 8, -1))}
        if not is_linear(name, tensor):
            return {name: tensor}
        matrix = tensor.T if transposed else tensor
        same = dequantise(grouped.quantise(matrix, bits, size))
        return {name: same.T.contiguous() if transposed else same}

    return _write(source, target, change, None)


def _is_transposed(config: dict[str, Any]) -> bool:
    """Whether weights are stored as [in, out]."""
    return config["model_type"] in ("gpt2", "gpt_bigcode") and "GPT2" in str(
        config["architectures"]
    )


def _write(
    source: Path,
    target: Path,
    change: Callable[[str, Tensor], dict[str, Tensor]],
    scheme: dict[str, Any] | None,
) -> Path:
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    if scheme is not None:
        config["quantization_config"] = scheme
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors |= change(name, tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
