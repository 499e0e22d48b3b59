"""Values made of files on disk, made again when the files change.

What counts is the file that a path leads to, so a renamed file, a file rewritten in place and a
swapped symbolic link (as Kubernetes updates a mounted secret) are all seen. A change that cannot
be used, such as a half-written file or a key that does not fit its certificate, keeps the old
value until the next change.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tgis.observe.metrics import Metrics

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# Within the granularity of its time stamp a file may change without looking different.
_SETTLING_NS = 2_000_000_000

T = TypeVar("T")
_Identity = tuple[int, ...]


class BadFileError(Exception):
    """Files that no value can be made of; `str()` says why, without what is in them."""


class Watched(Generic[T]):
    """The value of some files, which `refresh` brings up to date.

    Args:
        label: of the metric that counts changes.
        paths: the files.
        make: makes the value of their contents, or raises `BadFileError`.
        on_change: told every new value but the first.

    Raises:
        BadFileError: there is no first value.
    """

    def __init__(
        self,
        label: str,
        paths: Sequence[Path],
        make: Callable[[list[bytes]], T],
        metrics: Metrics,
        on_change: Callable[[T], None] = lambda _: None,
    ) -> None:
        self._label = label
        self._paths = paths
        self._make = make
        self._metrics = metrics
        self._on_change = on_change
        self._identities: list[_Identity] = []
        self._is_settled = False
        self._seen: list[bytes | None] = []
        self._look()
        self.value: T = self._made()

    def refresh(self) -> None:
        """Look at the files, and make the value again if they have changed."""
        if not self._look():
            return
        names = ", ".join(map(str, self._paths))
        try:
            value = self._made()
            self._on_change(value)
        except BadFileError as error:
            self._metrics.count("tgi_credentials_reload_count", file=self._label, result="failure")
            log.error("%s changed and cannot be used, keeping the old: %s", names, error)
            return
        self.value = value
        self._metrics.count("tgi_credentials_reload_count", file=self._label, result="success")
        log.info("%s changed and is in use", names)

    def _look(self) -> bool:
        """Read what may have changed; whether it has."""
        identities = [_identity(path) for path in self._paths]
        if identities == self._identities and self._is_settled:
            return False
        self._identities = identities
        newest = max((identity[-1] for identity in identities if identity), default=0)
        self._is_settled = time.time_ns() - newest > _SETTLING_NS
        contents = [_contents(path) for path in self._paths]
        changed = contents != self._seen
        self._seen = contents
        return changed

    def _made(self) -> T:
        contents = []
        for path, content in zip(self._paths, self._seen, strict=True):
            if content is None:
                raise BadFileError(f"cannot read {path}")
            contents.append(content)
        return self._make(contents)


async def keep_fresh(watched: Sequence[Watched[Any]]) -> None:
    """Refresh for ever."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        for item in watched:
            item.refresh()


def _identity(path: Path) -> _Identity:
    """What differs when the file that a path leads to has changed; () if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _contents(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
