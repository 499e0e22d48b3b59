"""Compiles the C kernels into one shared library, and finds it again.

The library's name has the instruction sets that it needs too. `python -m tgis.models.kernels.build`
puts it beside this module, at install or in a container image; else it is compiled into the
cache directory when it is first needed, which takes about two seconds.
It is linked against the very OpenMP runtime that torch has loaded, so that both share one pool of
threads.
"""

import argparse
import hashlib
import platform
from pathlib import Path
from typing import NamedTuple

import torch  # first of all for its effect: loads torch's OpenMP runtime

from tgis import clib
from tgis.clib import BuildError

SOURCE = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "lib"
OPTIONS = (
    *("-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)


class Target(NamedTuple):
    """A set of instruction sets: as `/proc/cpuinfo` names them, and as the compiler does."""

    name: str
    cpu_flags: frozenset[str]
    options: tuple[str, ...]


def _target(name: str, cpu_flags: str, options: str) -> Target:
    return Target(name, frozenset(cpu_flags.split()), tuple(options.split()))


_AVX2 = ("avx2 fma f16c bmi2", "-mavx2 -mfma -mf16c -mbmi2")
_AVX512 = (
    _AVX2[0] + " avx512f avx512bw avx512vl avx512dq",
    _AVX2[1] + " -mavx512f -mavx512bw -mavx512vl -mavx512dq",
)
_BF16 = (_AVX512[0] + " avx512_bf16", _AVX512[1] + " -mavx512bf16")
_AMX = (
    _BF16[0] + " amx_tile amx_bf16 amx_int8",
    _BF16[1] + " -mamx-tile -mamx-bf16 -mamx-int8",
)
TARGETS = [
    _target("amx", *_AMX),
    _target("avx512bf16", *_BF16),
    _target("avx512", *_AVX512),
    _target("avx2", *_AVX2),
    _target("generic", "", ""),
]


def cpu_flags() -> list[str]:
    """What this CPU can do, in the words of `/proc/cpuinfo`."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    lines = (line.partition(":")[2].split() for line in cpuinfo.splitlines() if "flags" in line)
    return next(lines, [])


def cpu_target() -> Target:
    """The best target that this CPU runs."""
    flags = frozenset(cpu_flags())
    return next(target for target in TARGETS if target.cpu_flags <= flags)


def openmp_runtime() -> Path:
    """The file of the OpenMP runtime that torch has loaded into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise BuildError("the loaded OpenMP runtime cannot be determined") from error
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/lib" in line}
    found = [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp"))]
    # Other packages may have brought runtimes of their own; torch's is the one that computes.
    own = [path for path in found if Path(torch.__file__).parent in Path(path).parents]
    found = own or found
    if len(found) != 1:
        raise BuildError(f"{len(found)} OpenMP runtimes are loaded, not one")
    return Path(found[0])


def file_name(target: Target) -> str:
    """The library's name for a target: of these sources, this machine type, this torch."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    versions = (platform.machine(), torch.__version__, openmp_runtime().name)
    digest.update(repr((clib.OPTIONS, OPTIONS, target.options, versions)).encode())
    return f"tgis_kernels_{target.name}_{digest.hexdigest()[:16]}.so"


def compile_library(directory: Path, target: Target, extra_options: tuple[str, ...] = ()) -> Path:
    """Compile for a target into a directory, atomically.

    Raises:
        BuildError: no compiler, no room, or the compiler failed.
    """
    runtime = openmp_runtime()
    # OPTIONS hold -fopenmp, whose own runtime comes after ours and is then not needed.
    link = ["-Wl,--as-needed", str(runtime), f"-Wl,-rpath,{runtime.parent}"]
    path, options = directory / file_name(target), [*OPTIONS, *target.options]
    return clib.compile_library(path, SOURCE.glob("*.c"), options, [*extra_options, *link])


def find_or_compile(cache_dir: Path | None = None) -> Path:
    """The library for this CPU, compiled if need be.

    Raises:
        BuildError: there is none, and none can be made.
    """
    target, cache = cpu_target(), cache_dir or clib.user_cache()
    found = clib.find(file_name(target), PREBUILT, cache)
    return found or compile_library(cache, target)


def main() -> None:
    """Compile ahead of time."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels ahead of time.")
    parser.add_argument("--into", type=Path, default=PREBUILT, help="directory (default: package)")
    parser.add_argument("--target", choices=[target.name for target in TARGETS], action="append")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)  # for others to read, unlike a cache
    chosen = arguments.target or [cpu_target().name]
    for target in TARGETS:
        if target.name in chosen:
            print(compile_library(arguments.into, target))


if __name__ == "__main__":
    main()
