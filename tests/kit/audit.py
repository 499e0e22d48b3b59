"""What no process of the project does: an audit hook (PEP 578) that takes note of it.

- unpickle something that names a class or function; in a server, unpickle anything at all;
- connect to another machine, or look one up;
- write outside the directories that are declared below.

The hook only writes the events down, one a line; `tests/conftest.py` makes a run with any of them
fail. `.pt` and `.bin` files are read by a parser of its own that knows tensors and nothing else
(`weights_only`).
"""

import io
import ipaddress
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

VARIABLE = "TGIS_TEST_AUDIT"  # names the record
SITE = Path(__file__).with_name("site")  # makes every process of a server install the hook

ROOT = Path(__file__).resolve().parents[2]

# Of a developer's checkout: caches of tools, and what is built.
_IN_CHECKOUT = (".hypothesis", ".ruff_cache", ".mypy_cache", "build")
# Ray is a cluster of its own beside the servers that it starts, and never in one.
_BESIDE = "/site-packages/ray/"
_DEVICES = ("/dev/null", "/dev/tty", "/dev/shm/", "/dev/std", "/dev/termination-log")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def declared() -> tuple[str, ...]:
    """Where may be written: /tmp, the cache of compiled kernels, and what tools keep."""
    home = Path.home()
    caches = [home / ".cache" / "tgis", Path(os.environ.get("XDG_CACHE_HOME", home)) / "tgis"]
    places = [Path(tempfile.gettempdir()), *caches, *(ROOT / name for name in _IN_CHECKOUT)]
    return tuple(str(place.resolve()) for place in places)


def faults(record: Path) -> list[str]:
    """What was written down, each once."""
    return list(dict.fromkeys(record.read_text(errors="replace").splitlines()))


def install(record: Path, server: bool = False) -> None:
    """From now on write down what should not happen in this process, or in a server's."""
    fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    allowed = declared()
    busy = False

    def note(text: str) -> None:
        frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()[:-2]]
        if any(_BESIDE in frame for frame in frames):
            return
        os.write(fd, f"{text} by {' < '.join(reversed(frames[-6:]))}\n".encode())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        judge = _JUDGES.get(event)
        if judge is None or busy:
            return
        busy = True
        try:
            if (fault := judge(args, allowed)) is not None:
                note(f"{event}: {fault}")
        finally:
            busy = False

    sys.addaudithook(hook)
    if server:
        _watch_pickles(note)


def _watch_pickles(note: Callable[[str], None]) -> None:
    """There is no audit event for pickles that name nothing."""

    class Unpickler(pickle.Unpickler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            note("a pickle is read")
            super().__init__(*args, **kwargs)

    def load(*args: Any, **kwargs: Any) -> Any:
        return Unpickler(*args, **kwargs).load()

    def loads(data: Any, /, **kwargs: Any) -> Any:
        return Unpickler(io.BytesIO(data), **kwargs).load()

    for module in (pickle, sys.modules["_pickle"]):
        vars(module).update(Unpickler=Unpickler, load=load, loads=loads)


def _connected(args: tuple[Any, ...], allowed: tuple[str, ...]) -> str | None:
    address = args[1]
    return None if not isinstance(address, tuple) or _is_here(address[0]) else str(address)


def _looked_up(args: tuple[Any, ...], allowed: tuple[str, ...]) -> str | None:
    """A number asks nobody."""
    return None if _is_here(args[0]) or _address(args[0]) else str(args[0])


def _is_here(host: object) -> bool:
    """Whether a host is this machine; "" and None are addresses to listen on."""
    address = _address(host)
    return host in (None, "", b"", "localhost", b"localhost") or (
        address is not None and (address.is_loopback or address.is_unspecified or _is_ours(address))
    )


@cache
def _is_ours(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an interface of this machine has it: Ray tells ranks such a one to meet at."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _address(host: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None


def _opened(args: tuple[Any, ...], allowed: tuple[str, ...]) -> str | None:
    path, mode, flags = args
    if not flags & _WRITES and not (mode and set(mode) & set("wxa+")):
        return None
    if flags & os.O_TMPFILE != os.O_TMPFILE and _is_directory(path):
        return None  # which cannot succeed
    return _written((path,), allowed)


def _is_directory(path: Any) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and os.path.isdir(path)


def _written(args: tuple[Any, ...], allowed: tuple[str, ...]) -> str | None:
    """Of the paths, the first that lies where nobody may write."""
    for path in args:
        if not isinstance(path, str | bytes | os.PathLike):
            continue
        name = os.path.abspath(os.fsdecode(path))
        if "__pycache__" in name or name.startswith(("/proc/", *_DEVICES)):
            continue
        place = os.path.realpath(os.path.dirname(name))
        if not os.path.isdir(place):
            continue  # which cannot succeed
        if not any(f"{real}/".startswith(root + "/") for root in allowed for real in (place, name)):
            return name
    return None


def _first(args: tuple[Any, ...], allowed: tuple[str, ...]) -> str | None:
    return _written((_at(args[0], args[-1]),), allowed)


def _at(path: Any, dir_fd: int) -> Any:
    """A path that may be relative to an open directory."""
    if dir_fd < 0 or not isinstance(path, str | bytes):
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fsdecode(path))


def _both(args: tuple[Any, ...], allowed: tuple[str, ...]) -> str | None:
    return _written(args[:2], allowed)


Judge = Callable[[tuple[Any, ...], tuple[str, ...]], str | None]
_JUDGES: dict[str, Judge] = {
    "pickle.find_class": lambda args, allowed: f"{args[0]}.{args[1]}",
    "socket.connect": _connected,
    "socket.sendto": _connected,
    "socket.getaddrinfo": _looked_up,
    "socket.gethostbyname": _looked_up,
    "open": _opened,
    "os.mkdir": _first,
    "os.rename": _both,
    "os.remove": _first,
    "os.rmdir": _first,
    "os.truncate": lambda args, allowed: _written(args[:1], allowed),
    "os.symlink": lambda args, allowed: _written(args[1:2], allowed),
    "os.link": lambda args, allowed: _written(args[1:2], allowed),
}
