"""Tensors of a model directory, read from memory-mapped safetensors files.

File format: https://huggingface.co/docs/safetensors. Nothing is read before it is asked for, and
pages that have been read are given back at once, so that loading needs no second copy of the model.
"""

import json
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tgis.errors import ModelError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as tensors are taken."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` .. `stop` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """All tensors of a model by name; use `open_checkpoint` to make one.

    Args:
        infos: name -> place.
        progress: told after each tensor that has been taken for the first time.
    """

    def __init__(self, infos: dict[str, TensorInfo], progress: Progress | None = None) -> None:
        self._infos = infos
        self._progress = progress
        self._maps: dict[Path, mmap.mmap] = {}
        self._taken: set[str] = set()
        self._bytes_done = 0
        self.num_bytes = sum(info.stop - info.start for info in infos.values())

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            ModelError: there is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise ModelError(f"weight {name} does not exist") from None

    @contextmanager
    def tensor(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A tensor as it is in the file, without a copy; its pages are given back on exit.

        Raises:
            ModelError: there is no such tensor, or it does not have this shape.
        """
        info = self.info(name)
        if info.shape != shape:
            raise ModelError(
                f"weight {name} has shape {list(info.shape)} in {info.file.name},"
                f" but config.json asks for {list(shape)}"
            )
        mapped = self._map(info.file)
        try:
            yield _view(mapped, info)
        finally:
            _drop_pages(mapped, info)
        self._count(name, info)

    def untaken(self) -> list[str]:
        """Names of the tensors that nobody has asked for, sorted."""
        return sorted(self._infos.keys() - self._taken)

    def close(self) -> None:
        """Forget the files; tensors still in use keep theirs."""
        self._maps.clear()

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # A private mapping: nothing writes to it, but torch warns of read-only buffers.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _count(self, name: str, info: TensorInfo) -> None:
        if name not in self._taken:
            self._taken.add(name)
            self._bytes_done += info.stop - info.start
            if self._progress is not None:
                self._progress(self._bytes_done, self.num_bytes)


def open_checkpoint(model_dir: Path, progress: Progress | None = None) -> Checkpoint:
    """Read the headers of a model's safetensors files.

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
    return Checkpoint(infos, progress)


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
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    shape = tuple(int(size) for size in entry["shape"])
    return TensorInfo(file, DTYPES[entry["dtype"]], shape, data_start + start, data_start + stop)


def _check(name: str, info: TensorInfo, data_start: int, file_size: int) -> None:
    """A tensor's bytes must be what its shape says, and inside the file."""
    num_bytes = info.dtype.itemsize
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


def _view(mapped: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    if info.start == info.stop:
        return torch.empty(info.shape, dtype=info.dtype)
    if info.start % info.dtype.itemsize:
        raw = torch.frombuffer(
            mapped, dtype=torch.uint8, count=info.stop - info.start, offset=info.start
        )
        return raw.clone().view(info.dtype).view(info.shape)
    count = (info.stop - info.start) // info.dtype.itemsize
    flat = torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=info.start)
    return flat.view(info.shape)


def _drop_pages(mapped: mmap.mmap, info: TensorInfo) -> None:
    start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
    if info.stop > start:
        mapped.madvise(mmap.MADV_DONTNEED, start, info.stop - start)
