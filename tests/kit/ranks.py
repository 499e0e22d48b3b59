"""Ranks of a group as threads of one process: what they compute is what processes compute."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from tgis.models.collectives import Group
from tgis.models.parallel import Shard

T = TypeVar("T")

# A test may share its cores with much else; those that wait for a timeout choose their own.
TIMEOUT = 60.0


class Ranks:
    """A connected group."""

    def __init__(self, groups: list[Group], threads: list[ThreadPoolExecutor]) -> None:
        self.groups = groups
        self._threads = threads

    def each(self, run: Callable[[Group], T]) -> list[T | Exception]:
        """What `run` returns or raises on every rank; all run at the same time."""
        pairs = zip(self._threads, self.groups, strict=True)
        futures = [thread.submit(run, group) for thread, group in pairs]
        failures = [future.exception() for future in futures]
        assert all(isinstance(f, Exception | None) for f in failures)
        pairs_of = zip(futures, failures, strict=True)
        return [future.result() if f is None else f for future, f in pairs_of]  # type: ignore[misc]


@contextmanager
def connected(world_size: int, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """A group of so many ranks that listens on 127.0.0.1."""
    threads = [ThreadPoolExecutor(1, f"rank{rank}") for rank in range(world_size)]
    groups = [Group(Shard(rank, world_size), timeout) for rank in range(world_size)]
    ranks, store = Ranks(groups, threads), dist.HashStore()
    try:
        assert ranks.each(lambda group: group.connect(store, "127.0.0.1")) == [None] * world_size
        yield ranks
    finally:
        for thread in threads:
            thread.shutdown()


def listening(pid: int | str = "self") -> set[str]:
    """Addresses that a process listens on, as hexadecimal numbers of the kernel's tables."""
    links = (str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink())
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(words[1].partition(":")[0])
    return found
