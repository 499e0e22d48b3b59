"""All tensors of PEFT's file by name: what they are is known before they are read."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.adapters.pickles import is_plain, read_pickle
from tgis.adapters.store import PEFT_FILES, Directory, Refused
from tgis.hub.safetensors import DTYPES
from tgis.types import AdapterKind

_MAX_HEADER_BYTES = 4 << 20
_MAX_PICKLE_BYTES = 4 << 20
_MAX_RECORDS = 20_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file; `rows` reads its first rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable[[int], Tensor]


def stored_tensors(directory: Directory, kind: AdapterKind, limit: int) -> dict[str, StoredTensor]:
    """The tensors of an adapter, of which only headers are read (of a .bin file: everything).

    Args:
        limit: most bytes of a .bin file.

    Raises:
        Refused: there is no such file, or it is broken.
    """
    name = directory.peft_file()
    if name is None:
        raise Refused(f"neither {' nor '.join(PEFT_FILES)} is there", kind=kind)
    if name.endswith(".safetensors"):
        return _read_header(directory, name, kind)
    found = read_pickle(
        directory, name, kind, limit + _MAX_PICKLE_BYTES, _MAX_PICKLE_BYTES, _MAX_RECORDS
    )
    if not isinstance(found, dict):
        raise Refused(f"{name} holds no tensors by name", kind=kind)
    tensors = {}
    for key, tensor in found.items():
        if not isinstance(key, str) or not is_plain(tensor):
            raise Refused(f"{name} holds more than tensors by name", kind=kind)
        tensors[key] = _in_memory(tensor)
    return tensors


def _in_memory(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tensor.dtype, tuple(tensor.shape), lambda count: tensor[:count])


def _read_header(directory: Directory, name: str, kind: AdapterKind) -> dict[str, StoredTensor]:
    """Each tensor's place must be in the file, and as large as its shape says."""
    size = directory.size(name)
    broken = Refused(f"{name} has a broken safetensors header, or none", kind=kind)
    if size < 8:
        raise broken
    (length,) = struct.unpack("<Q", directory.read(name, 8, 0, 8))
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise broken
    try:
        entries = json.loads(directory.read(name, length, 8, 8 + length))
        entries.pop("__metadata__", None)
        places = {str(key): _place(entry, 8 + length) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise broken from None
    tensors = {}
    for key, (dtype, shape, start, stop) in places.items():
        num_bytes = dtype.itemsize
        for n in shape:
            num_bytes *= n
        if min(shape, default=0) < 0 or stop - start != num_bytes or start < 8 + length:
            raise broken
        if stop > size:
            raise Refused(f"{name} is truncated", kind=kind)
        tensors[key] = _in_file(directory, name, dtype, shape, start)
    return tensors


def _place(entry: dict[str, object], data: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    shape = tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
    start, stop = (data + int(offset) for offset in entry["data_offsets"])  # type: ignore[attr-defined]
    return DTYPES[str(entry["dtype"])], shape, start, stop


def _in_file(
    directory: Directory, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int
) -> StoredTensor:
    def rows(count: int) -> Tensor:
        wanted = (min(count, shape[0]), *shape[1:])
        num_bytes = dtype.itemsize
        for n in wanted:
            num_bytes *= n
        data = directory.read(name, num_bytes, start, start + num_bytes)
        if not data:
            return torch.empty(wanted, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(wanted)

    return StoredTensor(dtype, shape, rows)
