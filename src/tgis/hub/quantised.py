"""Writing a checkpoint of which some weights have been replaced by quantised ones."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tgis.errors import ModelError
from tgis.hub.headers import INDEX_NAME, SINGLE_NAME
from tgis.hub.safetensors import Checkpoint

SHARD_BYTES = 10_000_000_000
# What goes along: configuration and tokenizer, but no weights.
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
_METADATA = {"format": "pt", "quantized": "gptq", "origin": "text-generation-inference"}

Replacement = Callable[[], dict[str, Tensor]]
"""Makes the tensors that stand for a weight."""


def write_checkpoint(
    source: Checkpoint,
    source_dir: Path,
    target: Path,
    replaced: Mapping[str, Replacement],
    quantization: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors, configuration and tokenizer.

    Args:
        source: the original weights.
        source_dir: where they are, with their configuration.
        target: a directory that exists.
        replaced: name of a stored weight -> its replacement.
        quantization: what becomes `quantization_config`.
        shard_bytes: of tensors in one file, at most.

    Raises:
        OSError: of writing.
    """
    _write_tensors(_tensors(source, replaced), target, shard_bytes)
    for pattern in _COPIED:
        for file in source_dir.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    config = json.loads((source_dir / "config.json").read_bytes())
    _write_json(target / "config.json", {**config, "quantization_config": dict(quantization)})
    _write_json(target / "quantize_config.json", dict(quantization))


def stored_weight(module: str, checkpoint: Checkpoint) -> str:
    """The stored weight of a module: by its name, more of a prefix or less.

    Raises:
        ModelError: there is none, or several could be meant.
    """
    name = f"{module}.weight"
    if name in checkpoint:
        return name
    tail = name.split(".", 1)[1]
    found = [stored for stored in checkpoint.infos if stored == tail or stored.endswith(f".{name}")]
    if len(found) != 1:
        raise ModelError(f"{len(found)} stored weights could be the layer {module}")
    return found[0]


def _tensors(
    source: Checkpoint, replaced: Mapping[str, Replacement]
) -> Iterable[dict[str, Tensor]]:
    for name, info in source.infos.items():
        if name in replaced:
            yield replaced[name]()
            continue
        with source.tensor(name, info.shape) as stored:
            yield {name: stored.clone()}


def _write_tensors(groups: Iterable[dict[str, Tensor]], target: Path, shard_bytes: int) -> None:
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal held
        path = target / f"part-{len(files)}.safetensors"
        save_file(shard, path, metadata=_METADATA)
        path.chmod(0o644)  # the library's own choice is for the user alone
        files.append((path, list(shard)))
        shard.clear()
        held = 0

    for tensors in groups:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shard and held + size > shard_bytes:
            flush()
        shard.update(tensors)
        held, total = held + size, total + size
    flush()
    if len(files) == 1:
        files[0][0].replace(target / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for n, (path, names) in enumerate(files, start=1):
        file = f"model-{n:05}-of-{len(files):05}.safetensors"
        path.replace(target / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
