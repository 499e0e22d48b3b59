"""A decoding step that Python runs once, and one C call ever after.

Between the kernels of a small model's step lies more time than one would think: each call from
Python costs 5 to 20 microseconds once the weights have swept the interpreter out of the caches, and
the threads that wait for the next kernel go to sleep. So the calls of a step are recorded, with
their arguments, and replayed without Python: on a CPU, what CUDA graphs are on a GPU.
"""

import ctypes
import logging
import weakref
from collections.abc import Callable, Hashable
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tgis.models.kernels import native

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64
_COPY = Struct("@3q")  # to, from, bytes
_CALL = Struct("@2q")  # function, struct


def replayed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """See `reference.replayed`."""
    return Replay(function)


class Replay:
    """See `reference.replayed`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._memory = _Memory()
        self._recorded: dict[Hashable, _Recorded | None] = {}
        self._foreign: str | None = None

    def __call__(self, key: Hashable, *inputs: Tensor | None) -> Tensor:
        """Record or replay."""
        if key not in self._recorded:
            recorded, result = self._record(inputs)
            self._recorded[key] = recorded
            return result
        known = self._recorded[key]
        return self._function(*inputs) if known is None else known.run(inputs)

    def _record(self, inputs: tuple[Tensor | None, ...]) -> "tuple[_Recorded | None, Tensor]":
        own = tuple(None if x is None else x.clone() for x in inputs)
        watch = _Watch()  # type: ignore[no-untyped-call]
        with native.Recording(self._memory.recording()) as recording, watch:
            result = self._function(*own)
        if watch.foreign:
            if self._foreign is None:
                log.info("steps are not replayed: %s is not one of our kernels", watch.foreign)
            self._foreign = watch.foreign
            return None, result
        return _Recorded(recording.calls, own, result), result


class _Recorded:
    """The calls of one key."""

    def __init__(
        self, calls: list[tuple[int, bytes]], inputs: tuple[Tensor | None, ...], result: Tensor
    ) -> None:
        self._inputs = inputs
        self._result = result
        self._structs = [ctypes.create_string_buffer(struct, len(struct)) for _, struct in calls]
        packed = (
            _CALL.pack(function, ctypes.addressof(struct))
            for (function, _), struct in zip(calls, self._structs, strict=True)
        )
        self._calls = ctypes.create_string_buffer(b"".join(packed), _CALL.size * len(calls))
        self._names = [native.NAMES[function] for function, _ in calls]

    def run(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        copies = b"".join(
            _copy(own, x) for own, x in zip(self._inputs, inputs, strict=True) if own is not None
        )
        held = ctypes.create_string_buffer(copies, len(copies))
        timing = native.timing()
        seconds = (ctypes.c_double * len(self._names))() if timing else None
        native.replay(
            ctypes.addressof(held),
            ctypes.addressof(self._calls),
            ctypes.addressof(seconds) if seconds else 0,
            len(copies) // _COPY.size,
            len(self._names),
        )
        if timing and seconds:
            timing.calls += zip(self._names, seconds, strict=True)
        return self._result


def _copy(own: Tensor, x: Tensor | None) -> bytes:
    if x is None or x.shape != own.shape or x.dtype != own.dtype or not x.is_contiguous():
        raise ValueError("an input of a recorded key has another shape or type, or lies scattered")
    return _COPY.pack(own.data_ptr(), x.data_ptr(), own.nbytes)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operator that computes and is not ours."""

    foreign: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without this PyTorch imports its compiler, for seconds, to keep it off this class."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.foreign is None and not func.is_view:
            self.foreign = str(func)
        return func(*args, **(kwargs or {}))


class _Memory:
    """Where kernels' results lie in replays: blocks that all recordings share.

    Within a recording a block is used again as soon as the tensor in it is gone, as it will be in
    the replay, where all happens in the same order.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, list[Bytes]] = {}  # by size, a power of two

    def recording(self) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
        """An allocator for a new recording, to which all blocks are free."""
        free = {size: list(blocks) for size, blocks in self._blocks.items()}

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            size = dtype.itemsize
            for n in shape:
                size *= n
            rounded = 1 << max(size - 1, 63).bit_length()
            blocks = free.setdefault(rounded, [])
            block = blocks.pop() if blocks else self._new(rounded)
            array = block[:size]
            weakref.finalize(array, blocks.append, block)
            return torch.from_numpy(array).view(dtype).view(shape)

        return empty

    def _new(self, size: int) -> Bytes:
        memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        block = memory[start : start + size]
        self._blocks.setdefault(size, []).append(block)
        return block
