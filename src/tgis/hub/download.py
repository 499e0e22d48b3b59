"""Models from the Hugging Face hub into its local cache: TGIS's choice of files, the hub's layout.

    models--<org>--<name>/blobs/<etag>                 contents
                          snapshots/<commit>/<file>    links to them
                          refs/<revision>              the commit; written when all files are there

Files: https://huggingface.co/docs/huggingface_hub/guides/manage-cache, TGIS operations §6.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread, get_native_id
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]

from tgis.errors import ModelError
from tgis.hub.refusals import explained, full_disk
from tgis.hub.transfer import Blob, Count, Stopped, bytes_there, patiently, transfer

_T = TypeVar("_T")
_R = TypeVar("_R")

NOT_WEIGHTS = ("arguments", "args", "training")
_ETAG = re.compile(r"(?!\.+$)[\w.+@=-]{1,200}", re.ASCII)
_FAREWELL_SECONDS = 1.0  # for a thread to notice that another has failed
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Repository:
    """One revision of a model on the hub.

    Attributes:
        name: as the user wrote it.
        revision: branch, tag or commit.
        commit: what that is.
        files: names of the files at its top level.
        token: for the hub, or None for the one of the environment.
    """

    name: str
    revision: str
    commit: str
    files: tuple[str, ...]
    token: str | None


def look_up(name: str, revision: str | None, token: str | None) -> Repository:
    """Ask the hub for a model's commit and files.

    Raises:
        ModelError: it does not exist, is not open to this token, or the hub cannot be reached.
    """
    revision = revision or "main"
    if revision.startswith("/") or ".." in revision:
        raise ModelError(f"Model {name} has no revision {revision!a}: no branch has such a name")
    with explained(name, revision):
        info = HfApi().model_info(name, revision=revision, token=token, timeout=30.0)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ModelError(f"Model {name}: {constants.ENDPOINT} does not answer as a hub does")
    files = [sibling.rfilename for sibling in info.siblings or ()]
    top = sorted(file for file in files if not {"/", "\0"} & set(file))
    return Repository(name, revision, str(info.sha), tuple(top), token)


def choose(files: Iterable[str], extensions: Sequence[str]) -> list[str]:
    """TGIS's choice: files with one of the extensions, without what training has left behind."""
    return [
        file
        for file in files
        if file.endswith(tuple(extensions)) and not any(word in file for word in NOT_WEIGHTS)
    ]


def fetch(repository: Repository, files: Sequence[str], cache: Path, workers: int) -> Path:
    """Download files that are not in the cache; returns the snapshot's directory.

    Args:
        repository: where they are.
        files: their names.
        cache: the cache's directory.
        workers: files at once.

    Raises:
        ModelError: one line; whatever has been received is kept for the next attempt.
    """
    root = cache / ("models--" + repository.name.replace("/", "--"))
    snapshot = root / "snapshots" / repository.commit
    with explained(repository.name, repository.revision, cache):
        for directory in (root / "blobs", snapshot):
            directory.mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not (snapshot / file).exists()]
        crew = _Crew(workers)
        blobs = crew.map(lambda file: _head(repository, file, crew.stop), missing)
        if blobs:
            _Fetch(repository, root, crew).run(blobs)
        _write_ref(root / "refs", repository)
    return snapshot


def _head(repository: Repository, file: str, stop: Event) -> Blob:
    """Where a file's content is."""
    url = hf_hub_url(repository.name, file, revision=repository.commit)
    with explained(repository.name, repository.revision, file=file):
        found = patiently(lambda: get_hf_file_metadata(url, token=repository.token), stop)
    if not _ETAG.fullmatch(found.etag or ""):
        raise ModelError(f"{file}: {constants.ENDPOINT} gives it no usable ETag")
    return Blob(file, url, str(found.etag), found.size)


class _Fetch:
    """One call of `fetch`, when all sizes are known."""

    def __init__(self, repository: Repository, root: Path, crew: "_Crew") -> None:
        self._repository = repository
        self._blobs = root / "blobs"
        self._snapshot = root / "snapshots" / repository.commit
        self._crew = crew
        self._headers = build_hf_headers(token=repository.token)

    def run(self, blobs: Sequence[Blob]) -> None:
        there = sum(bytes_there(self._blobs / blob.etag) for blob in blobs)
        total = sum(blob.size or 0 for blob in blobs)
        if total - there > (free := shutil.disk_usage(self._blobs).free):
            raise full_disk(self._blobs, f"{total - there} bytes are needed, {free} are free")
        with _progress(self._repository.name, total, there) as bar:
            self._crew.map(self._place, blobs, bar.update)

    def _place(self, blob: Blob) -> None:
        """Bring a file into the snapshot."""
        with explained(self._repository.name, self._repository.revision, self._blobs, blob.name):
            target, link = self._blobs / blob.etag, self._snapshot / blob.name
            if (blob.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:
                self._leave_to_library(blob)
            elif not target.exists():
                transfer(blob, target, self._headers, self._crew.stop, self._crew.count)
            if not link.exists():
                _link(target, link)

    def _leave_to_library(self, blob: Blob) -> None:
        """For files that the hub does not send over plain HTTP; interrupted, they start anew."""
        hf_hub_download(
            self._repository.name,
            blob.name,
            revision=self._repository.commit,
            token=self._repository.token,
            cache_dir=self._blobs.parents[1],
        )


def _progress(name: str, total: int, there: int) -> Any:
    """A bar on stderr, redrawn seldom where it becomes lines of a log."""
    make: Any = tqdm
    make.monitor_interval = 0  # no thread but ours draws: tqdm keeps its lock if drawing fails
    return make(
        desc=name,
        total=total,
        initial=there,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not sys.stderr,  # closed
        mininterval=0.2 if sys.stderr and sys.stderr.isatty() else 10.0,
    )


def _link(blob: Path, link: Path) -> None:
    draft = _draft_of(link)
    try:
        draft.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:  # a file system without links; the hub's own library does the same
        blob.replace(link)
    else:
        draft.replace(link)


def _write_ref(refs: Path, repository: Repository) -> None:
    if repository.revision == repository.commit:
        return
    ref = refs / repository.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(ref)
    draft.write_text(repository.commit)
    draft.replace(ref)


def _draft_of(path: Path) -> Path:
    """Where something is made that then appears at `path` at once."""
    return path.with_name(f".{path.name}.{os.getpid()}-{get_native_id()}")


class _Crew:
    """Threads for a list of jobs. The first error stops all; Ctrl-C waits for none of them.

    Attributes:
        stop: set when no more is to be done.
        count: tells the waiting thread of progress.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._news: SimpleQueue[int | tuple[int, Any] | BaseException] = SimpleQueue()
        self.stop = Event()
        self.count: Count = self._news.put

    def map(
        self,
        work: Callable[[_T], _R],
        items: Sequence[_T],
        progress: Callable[[int], object] | None = None,
    ) -> list[_R]:
        """The results for all items; `progress` is called in the caller's thread.

        Raises:
            BaseException: the first one of `work`.
        """
        todo: SimpleQueue[tuple[int, _T]] = SimpleQueue()
        for pair in enumerate(items):
            todo.put(pair)
        threads = [
            Thread(target=self._work, args=(work, todo), daemon=True)
            for _ in range(min(self._size, len(items)))
        ]
        for thread in threads:
            thread.start()
        results: dict[int, _R] = {}
        try:
            while len(results) < len(items):
                news = self._news.get()
                if isinstance(news, BaseException):
                    raise news
                if isinstance(news, tuple):
                    results[news[0]] = news[1]
                elif progress:
                    progress(news)
        except BaseException as error:
            self.stop.set()
            for thread in threads if isinstance(error, Exception) else ():
                thread.join(_FAREWELL_SECONDS)
            raise
        return [results[index] for index in range(len(items))]

    def _work(self, work: Callable[[_T], _R], todo: "SimpleQueue[tuple[int, _T]]") -> None:
        while not self.stop.is_set():
            try:
                index, item = todo.get_nowait()
                self._news.put((index, work(item)))
            except (Empty, Stopped):
                return
            except BaseException as error:  # it is raised in the caller's thread
                self._news.put(error)
                return
