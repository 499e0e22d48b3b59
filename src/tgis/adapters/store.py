"""The directory of adapters: ids -> open directories, what lies there, and whether it has changed.

Links are resolved first, and what they lead to must lie in the store. What has been resolved is
then opened from the root downwards without following any link, so that nothing outside can be
opened, whatever others do to the directories meanwhile.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from tgis.errors import TgisError
from tgis.types import AdapterKind, Cause

_ID = re.compile(r"[/\w\-]+")
_MAX_CONFIG_BYTES = 1 << 20

CONFIG = "adapter_config.json"
DECODER, ENCODER = "decoder.pt", "encoder.pt"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there counts
_FILES = (CONFIG, *PEFT_FILES, DECODER, ENCODER)
_KINDS = {"LORA": AdapterKind.LORA, "PROMPT_TUNING": AdapterKind.PROMPT}


class Refused(TgisError):
    """An adapter cannot be used; `str()` says why, and names no path."""

    def __init__(
        self, message: str, cause: Cause = Cause.INVALID, kind: AdapterKind | None = None
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.kind = kind  # as far as it is known


class FileIdentity(NamedTuple):
    """A file at one moment: writing to it, replacing or removing it changes this."""

    name: str
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


Identity = tuple[FileIdentity, ...]


def is_valid_id(adapter_id: str) -> bool:
    """Whether an id may name an adapter: word characters, `-`, `_` and `/`, not absolute."""
    return bool(_ID.fullmatch(adapter_id)) and not adapter_id.startswith("/")


class Store:
    """The adapters below one directory.

    Args:
        root: the directory; it need not be there yet.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def ids(self) -> list[str]:
        """Ids of all directories that hold an adapter or what looks like one, sorted."""
        root, found = os.path.realpath(self._root), []
        for directory, subdirectories, files in os.walk(root):
            places = {directory: files}
            for link in (f"{directory}/{name}" for name in subdirectories):
                if os.path.islink(link):
                    with suppress(OSError):
                        places[link] = os.listdir(link)
            for place, names in places.items():
                if place != root and not set(_FILES).isdisjoint(names):
                    found.append(os.path.relpath(place, root))
        return sorted(found)

    @contextmanager
    def open(self, adapter_id: str) -> Iterator["Directory"]:
        """The directory of an adapter.

        Raises:
            Refused: the id is not valid, or there is no such directory in the store.
        """
        if not is_valid_id(adapter_id):
            raise Refused("not a valid id", Cause.MISSING)
        root = os.path.realpath(self._root)
        try:
            place = _resolve(root, os.path.join(root, adapter_id))
            handle = _open(root, place, os.O_DIRECTORY)
        except (OSError, ValueError):
            raise Refused("directory does not exist", Cause.MISSING) from None
        try:
            yield Directory(root, place, handle)
        finally:
            os.close(handle)


class Directory:
    """The open directory of one adapter; made by `Store.open`."""

    def __init__(self, root: str, place: str, handle: int) -> None:
        self._root = root
        self._place = place  # below the root, without links
        names = frozenset(os.listdir(handle))
        self.names = frozenset(name for name in names if not name.endswith(".swp"))

    def identity(self) -> Identity:
        """What lies there now, as far as it matters to an adapter."""
        found = []
        for name in _FILES:
            with suppress(OSError):
                handle = self._open(name)
                try:
                    found.append(_identify(name, handle))
                finally:
                    os.close(handle)
        return tuple(found)

    def kind(self) -> AdapterKind:
        """What the adapter is, by its files.

        Raises:
            Refused: nothing of the kind, or of a `peft_type` that is not supported.
        """
        if CONFIG in self.names:
            peft_type = self.config().get("peft_type")
            if not isinstance(peft_type, str) or peft_type not in _KINDS:
                shown = peft_type if isinstance(peft_type, str) else None
                raise Refused(_shown(shown), Cause.UNSUPPORTED)
            return _KINDS[peft_type]
        if self.names.isdisjoint({*PEFT_FILES, DECODER, ENCODER}):
            raise Refused(f"invalid adapter: no {CONFIG} found", Cause.NO_CONFIG)
        return AdapterKind.PROMPT

    def peft_file(self) -> str | None:
        """The name of PEFT's file of tensors, if there is one."""
        return next((name for name in PEFT_FILES if name in self.names), None)

    def config(self) -> dict[str, Any]:
        """`adapter_config.json`.

        Raises:
            Refused: it cannot be read or is no JSON object.
        """
        try:
            config = json.loads(self.read(CONFIG, _MAX_CONFIG_BYTES))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise Refused(f"{CONFIG} is not a JSON object")
        return config

    def size(self, name: str) -> int:
        """Bytes of a file; see `read` for errors."""
        with self._handle(name) as handle:
            return os.fstat(handle).st_size

    def read(self, name: str, limit: int, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` .. `stop` of a file (all of them, if not given).

        Args:
            limit: most bytes to read.

        Raises:
            Refused: there is no such regular file in the store, it is shorter, or what is to be
                read is more than the limit.
        """
        with self._handle(name) as handle:
            size = os.fstat(handle).st_size
            stop = size if stop is None else stop
            if stop - start > limit:
                raise Refused(f"{name} of {stop - start} bytes exceeds the limit of {limit}")
            with os.fdopen(os.dup(handle), "rb", buffering=0) as file:
                file.seek(start)
                data = bytearray()
                while chunk := file.read(stop - start - len(data)):
                    data += chunk
        if len(data) != stop - start:
            raise Refused(f"{name} is truncated")
        return bytes(data)

    @contextmanager
    def _handle(self, name: str) -> Iterator[int]:
        try:
            handle = self._open(name)
        except OSError as error:
            raise Refused(f"{name} cannot be read: {error.strerror}") from None
        try:
            yield handle
        finally:
            os.close(handle)

    def _open(self, name: str) -> int:
        place = _resolve(self._root, os.path.join(self._root, self._place, name))
        return _open(self._root, place, os.O_NONBLOCK)


def _resolve(root: str, path: str) -> str:
    """The path below `root` that `path` leads to.

    Raises:
        OSError: it leads to `root` itself or out of it, or there is nothing.
    """
    real = os.path.realpath(path, strict=True)
    if not real.startswith(root.rstrip("/") + "/"):
        raise FileNotFoundError(2, "no such file in the store")
    return real[len(root.rstrip("/")) + 1 :]


def _open(root: str, place: str, flags: int) -> int:
    """Open what lies at `place` below `root`, following no link on the way.

    Raises:
        OSError: there is no directory (`flags` with O_DIRECTORY) or regular file.
    """
    directory = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    *above, last = place.split("/")
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in above:
            below = os.open(part, directory, dir_fd=handle)
            os.close(handle)
            handle = below
        is_kind = stat.S_ISDIR if flags & os.O_DIRECTORY else stat.S_ISREG
        # Looked at before it is opened: opening a device or a pipe may have effects.
        if not is_kind(os.lstat(last, dir_fd=handle).st_mode):
            raise FileNotFoundError(2, "not a regular file")
        return os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=handle)
    finally:
        os.close(handle)


def _identify(name: str, handle: int) -> FileIdentity:
    found = os.fstat(handle)
    return FileIdentity(
        name,
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def _shown(text: str | None, limit: int = 64) -> str:
    """A word of a file for a message."""
    if text is None:
        return "None"
    return text[:limit] if text.isprintable() else ascii(text[:limit])
