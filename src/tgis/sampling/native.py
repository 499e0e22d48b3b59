"""The noise stream's C part: found, or compiled in a moment, or done without.

The library lies beside this module (`python -m tgis.sampling.native` puts it there, say for an
image without a compiler) or in the user's cache. It asks nothing of the CPU: the compiler makes
variants, the loader picks.
"""

import ctypes
import hashlib
import logging
import platform
from functools import cache
from pathlib import Path

from tgis import clib

_SOURCE = Path(__file__).with_name("noise.c")
_PREBUILT = _SOURCE.parent
_OPTIONS = ("-ffp-contract=off",)
_log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, and a line in the log, where it cannot be had."""
    try:
        cache = clib.user_cache()
        path = clib.find(_file_name(), _PREBUILT, cache) or _compile_into(cache)
        loaded = ctypes.CDLL(str(path))
    except (clib.BuildError, OSError) as error:
        _log.warning("seeded sampling runs without its C part, about five times slower: %s", error)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.tgis_noise_at.argtypes = [pointer, integer, pointer, integer, pointer]
    loaded.tgis_noise_at.restype = None
    loaded.tgis_noise_winner.argtypes = [pointer, integer, pointer]
    loaded.tgis_noise_winner.restype = integer
    return loaded


def _file_name() -> str:
    options = (*clib.OPTIONS, *_OPTIONS)
    digest = hashlib.sha256(_SOURCE.read_bytes() + repr(options).encode())
    return f"tgis_noise_{platform.machine()}_{digest.hexdigest()[:16]}.so"


def _compile_into(directory: Path) -> Path:
    return clib.compile_library(directory / _file_name(), [_SOURCE], _OPTIONS)


if __name__ == "__main__":
    print(_compile_into(_PREBUILT))
