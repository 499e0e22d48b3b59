"""Which tensors a model's safetensors files hold and where: headers and index, without torch.

File format: https://huggingface.co/docs/safetensors. Everything is checked against the sizes of the
files, so that what is refused is refused before anything large is read or allocated.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgis.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` .. `stop` of `file`."""

    file: Path
    dtype: str  # as the format names it
    shape: tuple[int, ...]
    start: int
    stop: int


def read_headers(model_dir: Path) -> dict[str, TensorInfo]:
    """The tensors of a model, by name.

    With an index only the files that it names are read; else `model.safetensors`; else every
    `*.safetensors` file.

    Raises:
        ModelError: no files, a broken file, an index that does not match, a name in two files.
    """
    index = model_dir / INDEX_NAME
    weight_map = _read_index(index) if index.is_file() else None
    files = _files(model_dir) if weight_map is None else sorted(set(weight_map.values()))
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if weight_map is not None and weight_map.get(name, file) != file:
                continue
            if name in infos:
                other = infos[name].file.name
                raise ModelError(f"Key {name} was found in multiple files: {other} and {file.name}")
            infos[name] = info
    for name, file in (weight_map or {}).items():
        if name not in infos:
            raise ModelError(f"{INDEX_NAME} places {name} in {file.name}, which does not hold it")
    return infos


def _files(model_dir: Path) -> list[Path]:
    if (model_dir / SINGLE_NAME).is_file():
        return [model_dir / SINGLE_NAME]
    files = sorted(model_dir.glob("*.safetensors"))
    if files:
        return files
    message = f"no .safetensors weights found in {model_dir}"
    if any(model_dir.glob("*.bin")):
        message += (
            "; its .bin weights can be converted with"
            f" `text-generation-server convert-to-safetensors {model_dir}`"
        )
    raise ModelError(message)


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> file.

    Raises:
        ModelError: not such an index, or it names a file that is not there.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): index.parent / Path(file).name for name, file in weight_map.items()}
    except _MALFORMED as error:
        raise ModelError(f"{index} is not an index of safetensors files: {error!r}") from None
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise ModelError(f"{index.name} names {file.name}, which is not in {index.parent}")
    return files


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, checked against the file's size.

    Raises:
        ModelError: the file is truncated or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(
                f"{file} is no safetensors file or is truncated:"
                f" a header of {length} bytes in a file of {size}"
            )
        header = handle.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        infos = {name: _info(file, 8 + length, entry) for name, entry in entries.items()}
    except _MALFORMED as error:
        raise ModelError(f"{file} has a broken safetensors header: {error!r}") from None
    for name, info in infos.items():
        _check(name, info, data_start=8 + length, file_size=size)
    return infos


def _info(file: Path, data_start: int, entry: dict[str, Any]) -> TensorInfo:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    if entry["dtype"] not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    shape = tuple(int(size) for size in entry["shape"])
    return TensorInfo(file, entry["dtype"], shape, data_start + start, data_start + stop)


def _check(name: str, info: TensorInfo, data_start: int, file_size: int) -> None:
    """A tensor's bytes must be what its shape says, and inside the file."""
    num_bytes = ITEM_BYTES[info.dtype]
    for size in info.shape:
        num_bytes *= size
    if min(info.shape, default=0) < 0 or info.stop - info.start != num_bytes:
        raise ModelError(
            f"{info.file}: tensor {name!r} of shape {list(info.shape)} needs {num_bytes} bytes,"
            f" but the header gives it {info.stop - info.start}"
        )
    if info.start < data_start or info.stop > file_size:
        raise ModelError(
            f"{info.file} is truncated: tensor {name!r} ends at byte {info.stop}"
            f" of a file of {file_size}"
        )
