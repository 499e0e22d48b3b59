"""What torch has saved, read as plain data."""

import io
import zipfile
from typing import TypeGuard

import torch
from torch import Tensor

from tgis.adapters.store import Directory, Refused
from tgis.types import AdapterKind

_END, _END_BYTES = b"PK\5\6", 22  # of a zip archive


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether this is a real tensor in memory, and nothing cleverer."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
    )


def read_pickle(
    directory: Directory,
    name: str,
    kind: AdapterKind,
    limit: int,
    max_pickle_bytes: int,
    max_records: int,
) -> object:
    """What is in a file of `torch.save`: no code is run, and nothing is unpacked.

    Only the archive format is taken, whose size says how much memory it can need.

    Args:
        kind: of the adapter.
        limit: most bytes of the file.
        max_pickle_bytes: of them that describe the tensors.
        max_records: most tensors, about.

    Raises:
        Refused: it is larger, broken, or holds anything but plain data.
    """
    data = directory.read(name, limit)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        records = []
    # Nothing behind the directory: that might be another one, for readers that look for it so.
    if not records or data.rfind(_END) != len(data) - _END_BYTES:
        raise Refused(f"{name} is truncated or is no file of torch.save", kind=kind)
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > len(data):
        raise Refused(f"{name} is compressed; torch.save does not do that", kind=kind)
    for record in records:
        is_pickle = record.filename.endswith(".pkl")
        if is_pickle and record.file_size > max_pickle_bytes:
            raise Refused(f"{name} holds more than tensors", kind=kind)
    if len(records) > max_records:
        raise Refused(f"{name} holds more than tensors", kind=kind)
    try:
        found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever a broken or hostile file makes of the library
        raise Refused(f"{name} is broken or holds more than tensors", kind=kind) from None
    return found
