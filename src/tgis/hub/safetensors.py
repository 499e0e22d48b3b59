"""Tensors of a model directory, read from memory-mapped safetensors files.

Nothing is read before it is asked for, and pages that have been read are given back at once, so
that loading needs no second copy of the model.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from tgis.errors import ModelError
from tgis.hub.headers import TensorInfo, read_headers

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as tensors are taken."""

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

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtypes, shapes and places of all tensors."""
        return self._infos

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
        info = self._checked(name, shape)
        mapped = self._map(info.file)
        try:
            yield _view(mapped, info)
        finally:
            _drop_pages(mapped, info)
        self._count(name, info)

    def lasting(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that stays in the file, also after `close`: the system reads it when it is used.

        Raises:
            ModelError: as `tensor`.
        """
        info = self._checked(name, shape)
        view = _view(self._map(info.file), info)
        self._count(name, info)
        return view

    def untaken(self) -> list[str]:
        """Names of the tensors that nobody has asked for, sorted."""
        return sorted(self._infos.keys() - self._taken)

    def close(self) -> None:
        """Forget the files; tensors still in use keep theirs."""
        self._maps.clear()

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.info(name)
        if info.shape != shape:
            raise ModelError(
                f"weight {name} has shape {list(info.shape)} in {info.file.name},"
                f" but config.json asks for {list(shape)}"
            )
        return info

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

    Raises:
        ModelError: see `read_headers`.
    """
    return Checkpoint(read_headers(model_dir), progress)


def _view(mapped: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    dtype = DTYPES[info.dtype]
    if info.start == info.stop:
        return torch.empty(info.shape, dtype=dtype)
    if info.start % dtype.itemsize:
        raw = torch.frombuffer(
            mapped, dtype=torch.uint8, count=info.stop - info.start, offset=info.start
        )
        return raw.clone().view(dtype).view(info.shape)
    count = (info.stop - info.start) // dtype.itemsize
    flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.start)
    return flat.view(info.shape)


def _drop_pages(mapped: mmap.mmap, info: TensorInfo) -> None:
    start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
    if info.stop > start:
        mapped.madvise(mmap.MADV_DONTNEED, start, info.stop - start)
