"""From a model's name to its files: the local Hugging Face cache or a directory, never the network.

TGIS operations §5. Only small JSON files are read; nothing heavy is imported.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tgis import demo
from tgis.config import Config
from tgis.errors import ModelError
from tgis.hub.facts import read_facts
from tgis.hub.onnx_files import find_graphs, with_weights
from tgis.types import ModelFiles, ModelKind

_LFS_POINTER = b"version https://git-lfs"
_INDEX = "model.safetensors.index.json"


def resolve(config: Config) -> ModelFiles:
    """Find the model and read its small files.

    Raises:
        ModelError: it is not there, incomplete or broken; one line.
    """
    if config.model_name is None:
        path, name = demo.model_dir(), "demo"
    else:
        name = config.model_name
        path = locate(name, config.revision, config.hf_hub_cache)
    values = read_json(path / "config.json", name)
    facts = read_facts(values, path, name)
    for_onnx = config.deployment_framework == "hf_optimum_ort"
    graphs = _graphs(path, name, facts["kind"]) if for_onnx else ()
    weights = graphs or _weights(path, name)
    _check_fetched(path, name, weights)
    return ModelFiles(name=name, path=str(path), weights=weights, config=values, **facts)


def locate(name: str, revision: str | None, cache: str) -> Path:
    """The directory of a model: in the cache if the cache knows it, else `name` as a path.

    Raises:
        ModelError: neither.
    """
    try:
        found = _in_cache(name, revision or "main", cache) or _directory(name)
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise ModelError(
            f"Failed to resolve config path: Model {name} not found: {error}"
        ) from None
    if found is None:
        where = cache or "(none: HF_HUB_CACHE, HF_HOME and HOME are not set)"
        raise ModelError(
            f"Failed to resolve config path: Model {name} not found: --model-name must be a"
            f" directory, or a model in the cache {where};"
            f" `text-generation-server download-weights {name}` fetches one"
        )
    return found


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from one of the model's files.

    Raises:
        ModelError: the file cannot be read or is no JSON object.
    """
    try:
        values = json.loads(path.read_bytes(), parse_int=_number)
        msgspec.msgpack.encode(values)  # it will travel to the other processes
    except OSError as error:
        raise ModelError(f"Model {name}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"Model {name}: {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"Model {name}: {path} is not a JSON object")
    return values


def _number(digits: str) -> int | float:
    """Integers beyond 64 bits stand for "no limit" and fit no message."""
    return int(digits) if len(digits) < 19 else float(digits)


def _in_cache(name: str, revision: str, cache: str) -> Path | None:
    """The snapshot of a cached model; None if the cache does not know the name."""
    root = Path(cache, "models--" + name.replace("/", "--"))
    if not cache or not root.is_dir():
        return None
    ref = root / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = root / "snapshots" / commit
    if not (snapshot / "config.json").is_file():
        raise ModelError(
            "Failed to resolve config path: Config file not found in local cache for model"
            f" {name}, revision {revision}; set --revision to one of {_revisions(root)}"
        )
    return snapshot


def _revisions(root: Path) -> str:
    refs, snapshots = root / "refs", root / "snapshots"
    names = [str(path.relative_to(refs)) for path in sorted(refs.rglob("*")) if path.is_file()]
    names += sorted(path.name for path in snapshots.glob("*"))
    return ", ".join(names[:8]) or "(none is there: download the model again)"


def _directory(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"Failed to resolve config path: Model {name} not found: it is a file; --model-name"
            " must be the directory around it"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"Failed to resolve config path: Model {name} not found: the directory has no"
            " config.json"
        )
    return path.absolute() if path.is_dir() else None


def _graphs(path: Path, name: str, kind: ModelKind) -> tuple[str, ...]:
    """The names of ONNX files; none if there are none, which the engine may make."""
    try:
        graphs = find_graphs(path, kind)
    except ModelError as error:
        raise ModelError(f"Model {name}: {error}") from None
    return tuple(with_weights(path, graphs)) if graphs else ()


def _weights(path: Path, name: str) -> tuple[str, ...]:
    """The names of the weight files.

    Raises:
        ModelError: there are none, or one is missing.
    """
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        _no_weights(path, name)
    return tuple(_indexed(path, name) if (path / _INDEX).is_file() else names)


def _check_fetched(path: Path, name: str, files: Iterable[str]) -> None:
    """Raise ModelError if a file only stands in for the real one."""
    for file in files:
        with (path / file).open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(
                    f"Model {name}: {path / file} is a Git LFS pointer, not the weights; fetch"
                    " them with `git lfs pull`"
                )


def _indexed(path: Path, name: str) -> list[str]:
    index = read_json(path / _INDEX, name).get("weight_map")
    if not isinstance(index, dict) or not all(type(file) is str for file in index.values()):
        raise ModelError(f"Model {name}: {path / _INDEX} has no usable weight_map")
    names = sorted(set(index.values()))
    missing = [file for file in names if not (path / file).is_file()]
    if missing:
        raise ModelError(
            f"Model {name}: {len(missing)} of {len(names)} weight files are missing, such as"
            f" {missing[0]}; complete the download"
        )
    return names


def _no_weights(path: Path, name: str) -> None:
    if any(path.glob("*.bin")):
        raise ModelError(
            f"Model {name}: No safetensors weights found - only .bin files; convert them with"
            f" `text-generation-server convert-to-safetensors {name}`"
        )
    raise ModelError(
        f"Weights not found in local cache for model {name}: no .safetensors file in {path}"
    )
