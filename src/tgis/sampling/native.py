"""The noise stream's C part: found, or compiled in a moment, or done without.

The library lies beside this module (`python -m tgis.sampling.native` puts it there, say for an
image without a compiler) or in the user's cache; its name holds a digest of the source, so that a
stale one is never loaded. It asks nothing of the CPU: the compiler makes variants, the
loader picks.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("noise.c")
_OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
_log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, and a line in the log, where it cannot be had."""
    try:
        cached = Path.home() / ".cache" / "tgis" / "kernels" / _file_name()
        path = next((p for p in (_beside(), cached) if p.is_file()), None)
        loaded = ctypes.CDLL(str(path or compile_to(cached)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # Runtime: no home
        _log.warning("seeded sampling runs without its C part, about five times slower: %s", error)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.tgis_noise_at.argtypes = [pointer, integer, pointer, integer, pointer]
    loaded.tgis_noise_at.restype = None
    loaded.tgis_noise_winner.argtypes = [pointer, integer, pointer]
    loaded.tgis_noise_winner.restype = integer
    return loaded


def compile_to(path: Path) -> Path:
    """Compile the library, atomically.

    Raises:
        OSError: no compiler, or no room.
        subprocess.CalledProcessError: the compiler failed.
    """
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (gcc, clang or cc) on the path")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        command = [compiler, *_OPTIONS, "-o", str(partial), str(_SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, check=True)
        partial.replace(path)
    return path


def _file_name() -> str:
    digest = hashlib.sha256(_SOURCE.read_bytes() + repr(_OPTIONS).encode())
    return f"tgis_noise_{platform.machine()}_{digest.hexdigest()[:16]}.so"


def _beside() -> Path:
    return _SOURCE.with_name(_file_name())


if __name__ == "__main__":
    print(compile_to(_beside()))
