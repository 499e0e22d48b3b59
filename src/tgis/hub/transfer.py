"""One file of the hub, over HTTP into the cache: resumed, checked, renamed when it is complete.

`huggingface_hub` throws a half-received file away when a download ends. Here it stays as
`<etag>.incomplete`, and the next attempt goes on from there, in this process or a later one.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TypeVar

from huggingface_hub import get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from tgis.errors import ModelError

READ_TIMEOUT = 30.0  # seconds without a byte
# Seconds before each further attempt after one that brought nothing; any byte starts them anew.
WAITS = (0.0, 1.0, 4.0, 15.0)
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_CHUNK_BYTES = 1 << 20

_T = TypeVar("_T")
Count = Callable[[int], None]
"""Told how many more bytes are there; less than 0 where some were thrown away."""


class Stopped(Exception):
    """A neighbour has failed, or the user has had enough."""


@dataclass(frozen=True, slots=True)
class Blob:
    """The content of a file.

    Attributes:
        name: of the file, for messages.
        url: where it is; the hub may redirect from there.
        etag: what the hub calls the content: its SHA-256, or Git's SHA-1 for small files.
        size: bytes; None if the hub does not say.
    """

    name: str
    url: str
    etag: str
    size: int | None


def bytes_there(target: Path) -> int:
    """How much of a file has been received."""
    for path in (target, _partial_of(target)):
        with suppress(FileNotFoundError):
            return path.stat().st_size
    return 0


def transfer(
    blob: Blob, target: Path, headers: Mapping[str, str], stop: Event, count: Count
) -> None:
    """Receive what is missing of a file.

    Args:
        blob: what to receive.
        target: where it belongs; it appears there complete and checked, or not at all.
        headers: of every request.
        stop: ends the attempt early.
        count: told of progress.

    Raises:
        Stopped: `stop` was set.
        ModelError: the bytes are not those that the hub promised.
        HTTPError, OSError: of the network or of the disk; what has been received is kept.
    """
    with _open_partial(target) as file:
        if file is None:
            return
        resumed = file.tell() > 0

        def receive() -> None:
            _receive(blob, file, headers, stop, count)

        patiently(receive, stop, file.tell)
        if resumed and not _is_sound(blob, file):
            _empty(file, count)
            patiently(receive, stop, file.tell)
        if not _is_sound(blob, file):
            _partial_of(target).unlink()
            raise ModelError(
                f"{blob.name}: the hub sent {file.seek(0, os.SEEK_END)} bytes that do not match"
                f" their checksum {blob.etag}; they are deleted, run the command again"
            )
        os.fsync(file)
        _partial_of(target).rename(target)


def _partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.incomplete")


@contextmanager
def _open_partial(target: Path) -> Iterator[FileIO | None]:
    """What is there of a file, for this thread alone, at its end; None if it is complete."""
    path = _partial_of(target)
    while True:
        with path.open("a+b", buffering=0) as file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if target.exists():  # another process was faster, and renamed or deleted our file
                path.unlink(missing_ok=True)
                yield None
                return
            if _is_at(file, path):
                file.seek(0, os.SEEK_END)
                yield file
                return


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def patiently(work: Callable[[], _T], stop: Event, done: Callable[[], int] = lambda: 0) -> _T:
    """Do some work, again while it fails in ways that pass.

    Args:
        work: what to do.
        stop: ends the attempts early.
        done: how much there is; patience is new whenever it has grown.

    Raises:
        Stopped: `stop` was set.
        Exception: what `work` raised last.
    """
    failures = 0
    while True:
        before = done()
        try:
            return work()
        except HTTPError as error:
            failures = 1 if done() > before else failures + 1
            if failures > len(WAITS) or not _passes(error):
                raise
        if stop.wait(WAITS[failures - 1]):
            raise Stopped


def _receive(
    blob: Blob, file: FileIO, headers: Mapping[str, str], stop: Event, count: Count
) -> None:
    """One request for the rest of a file."""
    if blob.size is None or file.tell() > blob.size:
        _empty(file, count)
    if (start := file.tell()) == blob.size:
        return
    headers = {**headers, "accept-encoding": "identity"}
    if start:
        headers["range"] = f"bytes={start}-"
    with get_session().stream("GET", blob.url, headers=headers, timeout=READ_TIMEOUT) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server knows no ranges
            _empty(file, count)
        for chunk in response.iter_bytes():
            if stop.is_set():
                raise Stopped
            _write(file, chunk)
            count(len(chunk))
    if blob.size is not None and file.tell() != blob.size:
        raise ModelError(
            f"{blob.name}: the hub sent {file.tell()} bytes and ended, but promised {blob.size};"
            " run the command again"
        )


def _passes(error: HTTPError) -> bool:
    """Whether the same request may succeed later."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in _PASSING


def _write(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _empty(file: FileIO, count: Count) -> None:
    count(-file.seek(0, os.SEEK_END))
    file.truncate(0)
    file.seek(0)


def _is_sound(blob: Blob, file: FileIO) -> bool:
    """Whether the content has the checksum that is its name, if the name is one."""
    digests = {
        64: [hashlib.sha256()],
        # Git's name of a content, or that of servers that mirror the hub
        40: [
            hashlib.sha1(f"blob {blob.size}\0".encode(), usedforsecurity=False),
            hashlib.sha1(usedforsecurity=False),
        ],
    }.get(len(blob.etag), [])
    file.seek(0)
    while digests and (chunk := file.read(_CHUNK_BYTES)):
        for digest in digests:
            digest.update(chunk)
    return not digests or blob.etag in [digest.hexdigest() for digest in digests]
