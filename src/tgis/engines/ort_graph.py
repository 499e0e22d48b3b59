"""One ONNX file, run by ONNX Runtime on torch's own memory.

Inputs and outputs are bound by address, so keys and values are copied only where the graph itself
copies them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgis.errors import ConfigError, ModelError

INSTALL = "pip install 'tgis[ort]'"
_NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")
_ERRORS_ONLY = 3  # ONNX Runtime's log severity

# torch type -> ONNX Runtime's name of it, and its number in ONNX.
_TYPES: dict[torch.dtype, tuple[str, int]] = {
    torch.float32: ("tensor(float)", 1),
    torch.float16: ("tensor(float16)", 10),
    torch.bfloat16: ("tensor(bfloat16)", 16),
    torch.int64: ("tensor(int64)", 7),
    torch.int32: ("tensor(int32)", 6),
    torch.bool: ("tensor(bool)", 9),
}
_BY_NAME = {name: dtype for dtype, (name, _) in _TYPES.items()}


class Port(NamedTuple):
    """An input or output of a graph; dimensions of any size have a name, or none."""

    dtype: torch.dtype
    shape: tuple[int | str | None, ...]


class Graph:
    """A loaded file.

    Attributes:
        inputs, outputs: by name, in the file's order.

    Raises:
        ModelError: ONNX Runtime cannot load the file; one line.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.name = path.name
        self._session = _open(path, threads)
        self.inputs = {port.name: self._port(port) for port in self._session.get_inputs()}
        self.outputs = {port.name: self._port(port) for port in self._session.get_outputs()}

    def run(
        self, feeds: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """Compute some of the outputs.

        Args:
            feeds: every input by name; converted to the type that the graph takes.
            wanted: the shape of each output that is to be computed.

        Raises:
            MemoryError: no memory for it.
        """
        binding = self._session.io_binding()
        held = []  # alive until the graph has run
        for name, port in self.inputs.items():
            tensor = feeds[name].to(port.dtype).contiguous()
            held.append(tensor)
            _bind(binding.bind_input, name, tensor)
        outputs = {
            name: torch.empty(tuple(shape), dtype=self.outputs[name].dtype)
            for name, shape in wanted.items()
        }
        for name, tensor in outputs.items():
            _bind(binding.bind_output, name, tensor)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            if any(text in str(error) for text in _NO_MEMORY):
                raise MemoryError(f"no memory for a step: {first_line(error)}") from error
            raise
        return outputs

    def _port(self, port: Any) -> Port:
        if port.type not in _BY_NAME:
            raise ModelError(
                f"{self.name}: {port.name} is of type {port.type}; only"
                f" {', '.join(_BY_NAME)} are supported"
            )
        return Port(_BY_NAME[port.type], tuple(port.shape))


def require_onnxruntime(setting: str) -> Any:
    """The library, if it is installed.

    Args:
        setting: what asks for it, for the message.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"{setting} needs ONNX Runtime ({error}): {INSTALL}") from None
    return onnxruntime


def session_options(threads: int) -> Any:
    """ONNX Runtime's options for a process with so many threads for computing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Plans are kept for every shape ever seen, and every step has a shape of its own.
    options.enable_mem_pattern = False
    # Between steps the other processes on this machine need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def first_line(error: Exception) -> str:
    """An error's first line, without ONNX Runtime's mark and number."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.removeprefix("[ONNXRuntimeError] : ")


def _open(path: Path, threads: int) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(
            str(path), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of many kinds, all for the same reason: the file
        raise ModelError(
            f"{path.name}: ONNX Runtime {onnxruntime.__version__} cannot load it:"
            f" {first_line(error)}"
        ) from None


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    # An empty tensor has no address, and ONNX Runtime takes none for an error.
    address = tensor.data_ptr() or _SOMEWHERE.data_ptr()
    bind(name, "cpu", 0, _TYPES[tensor.dtype][1], tuple(tensor.shape), address)


_SOMEWHERE = torch.zeros(1)
