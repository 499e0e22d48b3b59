"""How many threads compute the model."""

import os
from collections.abc import MutableMapping
from pathlib import Path

from tgis.types import ModelFiles

# A step over less is so short that waiting for the slowest thread costs more than sharing saves;
# on a busy machine it costs a time slice of the scheduler.
SMALL_MODEL_BYTES = 64 << 20
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

# Turns that a thread of OpenMP spins before it sleeps: about a millisecond. By default it spins for
# many, on a core that our kernels' threads or the front could use; if it sleeps much sooner,
# prompts take a fifth longer.
_SPINS = "20000"


def prepare_openmp(environ: MutableMapping[str, str]) -> None:
    """Let torch's waiting threads sleep soon, unless somebody has said how they are to wait.

    It has an effect only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Cores that this process may use: its affinity, or less by a cgroup's quota (v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def choose_threads(setting: int | None, files: ModelFiles, num_ranks: int = 1) -> tuple[int, str]:
    """The number of threads of one process, and why, for the log.

    Args:
        num_ranks: processes on this machine that share the model and the cores.
    """
    if setting is not None:
        return setting, "asked for"
    size = sum((Path(files.path) / name).stat().st_size for name in files.weights)
    if size < SMALL_MODEL_BYTES * num_ranks:
        return 1, "the model is small"
    if num_ranks > 1:
        return max(1, usable_cores() // num_ranks), f"usable cores, shared by {num_ranks} ranks"
    return usable_cores(), "one for each usable core"
