"""PyTorch's `.bin` weights as safetensors, beside them: TGIS operations §6.

Only tensors are read (`weights_only`): no code of a file ever runs. New files are written into
`.converting`, read again and compared; that directory then becomes `.converted`, whose files are
renamed to their places. Whatever an interruption leaves is thrown away in the first directory and
completed from the second by the next run; neither is ever taken for weights.
"""

import fcntl
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tgis.errors import ModelError
from tgis.hub.headers import INDEX_NAME, read_header
from tgis.hub.safetensors import DTYPES, Checkpoint
from tgis.hub.shared_tensors import duplicates, overlapping
from tgis.hub.weight_files import CONVERTED, weight_files

_INDEX_SUFFIX = ".bin.index.json"
_UNDONE = ".converting"
_NO_ROOM = re.compile(r"os error (\d+)")

Tensors = dict[str, torch.Tensor]
Report = Callable[[str], None]
_Places = dict[str, int | None]  # a file's tensors, each with its bytes; None for a duplicate


def convert_weights(model_dir: Path, report: Report) -> None:
    """Convert all `.bin` weights of a model.

    Args:
        model_dir: where they are; the new files come to the same place.
        report: told, in a line each, of progress or why there is nothing to do.

    Raises:
        ModelError: a file is broken, holds more than tensors, or cannot be written; one line, and
            no new file is left.
    """
    try:
        with _alone(model_dir):
            if (model_dir / CONVERTED).is_dir():
                _publish(model_dir)
                report("Finished a conversion that had been interrupted")
                return
            sources = weight_files(model_dir, ".bin")
            if refusal := _nothing_to_do(model_dir, sources):
                report(refusal)
                return
            _convert(model_dir, sources, report)
    except OSError as error:
        raise ModelError(_cannot_write(model_dir, str(error.strerror or error))) from None


def _nothing_to_do(model_dir: Path, sources: list[Path]) -> str | None:
    indexes = [str(path) for path in sorted(model_dir.glob(f"*{_INDEX_SUFFIX}"))]
    if len(indexes) > 1:
        return f"Found more than one .bin.index.json file: {indexes}"
    if not sources:
        return "No pytorch .bin files found to convert"
    if any((model_dir / _target(path)).exists() for path in sources):
        return "Existing .safetensors weights found, remove them first to reconvert"
    if indexes and (model_dir / _index_target(Path(indexes[0]))).exists():
        return f"Existing {INDEX_NAME} file found, remove it first to reconvert"
    return None


def _target(source: Path) -> str:
    return source.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _index_target(index: Path) -> str:
    name = index.name.removeprefix("pytorch_").removesuffix(_INDEX_SUFFIX)
    return f"{name}.safetensors.index.json"


def _convert(model_dir: Path, sources: list[Path], report: Report) -> None:
    undone = model_dir / _UNDONE
    shutil.rmtree(undone, ignore_errors=True)
    needed = sum(source.stat().st_size for source in sources)
    if needed > (free := shutil.disk_usage(model_dir).free):
        what = f"about {needed} bytes are needed, {free} are free"
        raise ModelError(_cannot_write(model_dir, what))
    undone.mkdir()
    try:
        places: dict[str, _Places] = {}
        for number, source in enumerate(sources, start=1):
            report(f"Converting {source.name} ({number} of {len(sources)})")
            places[source.name] = _convert_file(source, undone / _target(source), model_dir)
        for index in model_dir.glob(f"*{_INDEX_SUFFIX}"):
            _convert_index(index, places, undone / _index_target(index))
        undone.rename(model_dir / CONVERTED)
    except BaseException:
        shutil.rmtree(undone, ignore_errors=True)
        raise
    _publish(model_dir)


def _publish(model_dir: Path) -> None:
    """Move complete files to their places; an index first, for it makes the lack of others seen."""
    done = model_dir / CONVERTED
    for path in sorted(done.iterdir(), key=lambda path: (path.suffix != ".json", path.name)):
        path.rename(model_dir / path.name)
    done.rmdir()


def _convert_file(source: Path, target: Path, model_dir: Path) -> _Places:
    """Convert a file; returns the bytes of all its tensors."""
    tensors = _load(source)
    removed = duplicates(tensors, model_dir / "config.json")
    kept = {name: tensor for name, tensor in tensors.items() if name not in removed}
    _save(kept, target, {"format": "pt", **removed})
    _verify(kept, target)
    return {name: None if name in removed else tensor.nbytes for name, tensor in tensors.items()}


def _load(source: Path) -> Tensors:
    """The tensors of a file, memory-mapped where its format allows."""
    try:
        content = torch.load(
            source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source)
        )
    except Exception as error:  # of many kinds, all for the same reason: the file
        raise ModelError(f"cannot convert {source}: {_why(error)}") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ModelError(f"cannot convert {source}: it holds no tensors by name")
    return {name: _checked(name, value, source) for name, value in content.items()}


def _checked(name: Any, value: Any, source: Path) -> torch.Tensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise ModelError(f"cannot convert {source}: its entry {name!a} is no tensor but {kind}")
    if value.layout != torch.strided or value.dtype not in DTYPES.values():
        raise ModelError(
            f"cannot convert {source}: tensor {name!a} is of {value.dtype}, {value.layout},"
            " which safetensors files do not hold"
        )
    if value.nbytes > source.stat().st_size:  # an expanded view could be of any size
        raise ModelError(
            f"cannot convert {source}: tensor {name!a} claims {value.nbytes} bytes,"
            f" more than the file has"
        )
    return value.detach()


def _why(error: Exception) -> str:
    """What torch has against a file, without its advice to trust the file."""
    text = str(error)
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it asks for {name[1]}, which is no tensor and might run code; only files of plain"
            " tensors are converted"
        )
    text = text.rpartition("WeightsUnpickler error: ")[2]
    return " ".join(f"{type(error).__name__}: {text}".split())[:200]


def _save(tensors: Tensors, target: Path, metadata: dict[str, str]) -> None:
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for group in list(overlapping(own)):  # the library refuses them
        own |= {name: own[name].clone() for name in group[1:]}
    try:
        save_file(own, target, metadata)
    except SafetensorError as error:
        number = _NO_ROOM.search(str(error))
        what = os.strerror(int(number[1])) if number else " ".join(str(error).split())
        raise ModelError(_cannot_write(target.parents[1], what)) from None
    with target.open("rb") as file:
        os.fsync(file)


def _verify(tensors: Tensors, target: Path) -> None:
    """Read a written file as the server will, and compare every byte.

    Raises:
        ModelError: they differ.
    """
    infos = read_header(target)
    written = Checkpoint(infos)
    for name in sorted(tensors.keys() | infos.keys()):
        if name not in tensors or name not in infos:
            raise ModelError(f"The output tensors do not match for key {name}")
        with written.tensor(name, tuple(tensors[name].shape)) as tensor:
            if not _same_bytes(tensor, tensors[name]):
                raise ModelError(f"The output tensors do not match for key {name}")
    written.close()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality that holds for NaN too."""
    if one.dtype != other.dtype:
        return False
    flat = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def _convert_index(index: Path, places: dict[str, _Places], target: Path) -> None:
    """Write the index of the new files: the same names but those of duplicates.

    Raises:
        ModelError: it does not fit the files.
    """
    try:
        content = json.loads(index.read_bytes())
        weight_map = {str(name): str(file) for name, file in content["weight_map"].items()}
        metadata = dict(content.get("metadata") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of .bin files: {error!r}") from None
    for name, file in weight_map.items():
        if name not in places.get(file, {}):
            raise ModelError(f"{index} places {name!a} in {file}, which does not hold it")
    sizes = {name: places[file][name] for name, file in weight_map.items()}
    content["weight_map"] = {
        name: _target(Path(file)) for name, file in weight_map.items() if sizes[name] is not None
    }
    total = sum(size for size in sizes.values() if size is not None)
    content["metadata"] = {**metadata, "total_size": total}
    target.write_text(json.dumps(content, indent=4))


def _cannot_write(model_dir: Path, what: str) -> str:
    return f"cannot write safetensors files to {model_dir}: {what}; nothing was left there"


@contextmanager
def _alone(model_dir: Path) -> Iterator[None]:
    """One conversion at a time, also of several machines with one disk."""
    directory = os.open(model_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
