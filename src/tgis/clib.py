"""Compiling C into shared libraries, and finding them again.

A library's name holds a digest of everything that went into it, so a stale or foreign file is never
loaded. It is looked for where it may have been put ahead of time (at install, in an image), then
in the user's cache, and is else compiled into that.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")


class BuildError(Exception):
    """The library cannot be had; `str()` says why, in one line."""


def find(name: str, prebuilt: Path, cache: Path) -> Path | None:
    """The library of this name in the first of two directories that has it."""
    paths = (directory / name for directory in (prebuilt, cache))
    return next((path for path in paths if path.is_file()), None)


def user_cache(kind: str = "kernels") -> Path:
    """Where compiled libraries of a kind are kept for this user.

    Raises:
        BuildError: the user has no home directory.
    """
    try:
        return Path.home() / ".cache" / "tgis" / kind
    except RuntimeError as error:
        raise BuildError("the user has no home directory to keep a library in") from error


def compile_library(
    path: Path, sources: Iterable[Path], options: Iterable[str], link: Iterable[str] = ()
) -> Path:
    """Compile into a file, atomically; its directory is made for this user alone if need be.

    Args:
        options: besides `OPTIONS`.
        link: what comes after the sources.

    Raises:
        BuildError: no compiler, no room, or the compiler failed.
    """
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        raise BuildError("no C compiler (gcc, clang or cc) on the path")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            partial = Path(scratch) / path.name
            inputs = sorted(map(str, sources))
            command = [compiler, *OPTIONS, *options, "-o", str(partial), *inputs, *link, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise BuildError(f"{compiler} failed: {last}")
            partial.replace(path)
    except OSError as error:
        raise BuildError(f"{path.parent}: {error.strerror}") from error
    return path
