"""What the parts of a step take.

The core's own parts (scheduler, sampler, link) are timed from outside, by a stand-in that passes
their calls on. Inside the engine our kernels time themselves, replayed or not, and PyTorch's
profiler sees its operators; what is left of the engine's time is Python.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd.profiler import profile

PARTS = (
    "scheduling",
    "inputs",
    "linears",
    "attention",
    "head",
    "small kernels",
    "sampling",
    "emit",
    "python",
    "front",
)
"""In the order in which they are shown. inputs: PyTorch's operators that are no layers, such as
the step's index tensors and the embeddings; python: the rest of what is not the front's."""

Sums = defaultdict[str, float]
"""Seconds by part."""

_KERNELS = {
    **dict.fromkeys(("tgis_linear_bf16", "tgis_linear_int8", "tgis_linear_grouped"), "linears"),
    "tgis_attention": "attention",
}
_OPERATORS = {
    "mkldnn::_linear_pointwise": "linears",
    "onednn::qlinear_pointwise": "linears",
    "aten::linear": "linears",
    "aten::addmm": "linears",
    "aten::mm": "linears",
    "aten::matmul": "linears",
    "aten::scaled_dot_product_attention": "attention",
}


class Timed:
    """Stands in for an object: passes everything on, and sums what calls of its methods take."""

    def __init__(self, target: object, part: str, sums: Sums) -> None:
        self._target = target
        self._part = part
        self._sums = sums

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return value(*args, **kwargs)
            finally:
                self._sums[self._part] += time.perf_counter() - start

        setattr(self, name, call)
        return call


@contextmanager
def inside_engine(sums: Sums, steps: int) -> Iterator[None]:
    """Sum what the operators and kernels take in so many steps.

    All steps have the same layers; the last linear one of each is the head.
    """
    kernels: list[tuple[str, float]] = []
    with _kernel_times(kernels), profile() as profiler:
        yield
    operators = [
        (event.name, event.cpu_time_total * 1e-6)
        for event in sorted(profiler.function_events or (), key=lambda e: e.time_range.start)
        if event.cpu_parent is None and "::" in event.name
    ]
    found = [(_KERNELS.get(name, "small kernels"), seconds) for name, seconds in kernels]
    others = [(_OPERATORS.get(name, "inputs"), seconds) for name, seconds in operators]
    for calls in (found, others):
        layers = [i for i, (part, _) in enumerate(calls) if part == "linears"]
        per_step = len(layers) // steps
        for i in layers[per_step - 1 :: per_step] if per_step else ():
            calls[i] = ("head", calls[i][1])
        if layers:  # all of them are of one kind
            break
    for part, seconds in found + others:
        sums[part] += seconds


@contextmanager
def _kernel_times(calls: list[tuple[str, float]]) -> Iterator[None]:
    try:
        from tgis.models.kernels.native import Timing
    except (ImportError, OSError):  # no C kernels: all that computes is PyTorch's
        yield
        return
    with Timing() as timing:
        yield
    calls += timing.calls


def clocked(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
