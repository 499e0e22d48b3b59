"""What a step takes and what is left, in the memory that holds weights and cache."""

from collections.abc import Callable
from typing import Protocol

import torch

from tgis.engines.host_memory import available_memory, peak_of


class Meter(Protocol):
    """One memory."""

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that this takes at most beyond what is held before; 0 if nobody can tell."""

    def available(self) -> int:
        """Bytes that this process may still take."""


class HostMeter:
    """The machine's memory."""

    def peak(self, run: Callable[[], object]) -> int:
        """See `Meter.peak`."""
        return peak_of(run)

    def available(self) -> int:
        """See `Meter.available`."""
        return available_memory()


class CudaMeter:
    """A card's memory.

    Args:
        fraction: share of it that the process may use (`CUDA_PROCESS_MEMORY_FRACTION`).
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def peak(self, run: Callable[[], object]) -> int:
        """See `Meter.peak`."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def available(self) -> int:
        """See `Meter.available`."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        return max(min(free, int(self._fraction * total) - held), 0)


def meter_of(device: str, fraction: float) -> Meter:
    """The meter of a device's type."""
    return CudaMeter(fraction) if device == "cuda" else HostMeter()
