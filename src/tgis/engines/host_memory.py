"""How much memory a process may still take, and giving back what it does not use."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the machine's, or less by a cgroup's limit.

    Args:
        root: of the file system, for tests.
    """
    fields = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:")
    return min([available, *_cgroup_rooms(root)])


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What is left in each cgroup that this process is in, own and above, version 1 and 2."""
    names = ("memory.max", "memory.current", "inactive_file")
    names_v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = Path(path.lstrip("/"))
            if not controllers:
                base, files = root / "sys/fs/cgroup", names
            elif "memory" in controllers.split(","):
                base, files = root / "sys/fs/cgroup/memory", names_v1
            else:
                continue
            for group in (own, *own.parents):
                room = _cgroup_room(base / group, *files)
                if room is not None:
                    yield room


def _cgroup_room(group: Path, limit_name: str, usage_name: str, reclaimable: str) -> int | None:
    """Limit less usage; files that nobody has used lately do not count. None = no limit."""
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(int(limit) - usage + int(stat.get(reclaimable, 0)), 0)


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that this takes at most beyond what is held before.

    0 where the system does not tell a process its peak.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begins to measure the peak anew
    except OSError:
        run()
        return 0
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0) if before else 0


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def trim() -> None:
    """Give the allocator's free pages back: what loading leaves behind is a tenth of the weights.

    Does nothing where the C library has no such function (only glibc has).
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
