"""The ONNX Runtime engine: models as Optimum lays them out in `.onnx` files (`hub.onnx_files`).

Keys and values travel through inputs `past_key_values.N[.decoder|.encoder].key` and outputs
`present...`.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from tgis.config import Config
from tgis.engines.base import EngineCaps
from tgis.engines.ort_graph import Graph, Port, require_onnxruntime
from tgis.engines.padded import Inputs, PaddedEngine, merge_rows
from tgis.engines.probe import choose_batching
from tgis.errors import ModelError
from tgis.hub.onnx_files import expected, find_graphs
from tgis.hub.safetensors import Progress
from tgis.types import ModelFiles, ModelKind

log = logging.getLogger(__name__)

NAME = "hf_optimum_ort"
PAST = "past_key_values."
PRESENT = "present."
_CACHE = re.compile(
    r"(?:past_key_values|present)\.\d+\.(?:(?:de|en)coder\.)?(?:key|value|key_value)"
)
_CACHE_DIMS = (3, 4)  # [rows, heads, columns, size], or without heads
_OWN_MASKS = ("attention_mask", "decoder_attention_mask")
_COMMON = frozenset(
    {"input_ids", "position_ids", "cache_position", "use_cache_branch", *_OWN_MASKS}
)
_FED: dict[ModelKind, frozenset[str]] = {
    ModelKind.DECODER_ONLY: _COMMON,
    ModelKind.ENCODER_DECODER: _COMMON | {"encoder_attention_mask", "encoder_hidden_states"},
}


class Graphs(NamedTuple):
    """The graphs of a model; `first` and `later` may be the same."""

    encoder: Graph | None
    first: Graph
    later: Graph


@dataclass(slots=True)
class OrtState:
    """See `tgis.engines.padded.State`. Caches are named as in a graph, without `present.`.

    Attributes:
        own: keys and values of the decoder's tokens, [rows, (heads,) columns, size].
        cross: the same of the encoder's tokens; encoder-decoder only.
        encoded: the encoder's output [rows, encoder columns, size]; encoder-decoder only.
    """

    own: dict[str, Tensor]
    cross: dict[str, Tensor] = field(default_factory=dict)
    encoded: Tensor | None = None

    def save(self) -> Callable[[], None]:
        """See `State.save`: a pass makes new tensors and leaves these alone."""
        return lambda: None

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        encoded = [] if self.encoded is None else [self.encoded]
        return [*self.own.values(), *self.cross.values(), *encoded]


def load(
    config: Config, files: ModelFiles, dtype: torch.dtype, progress: Progress | None = None
) -> PaddedEngine[OrtState]:
    """Load a model's `.onnx` files; their own types count, not `dtype`.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        ModelError: there are no such files, or they are broken or of another layout.
    """
    require_onnxruntime(f"DEPLOYMENT_FRAMEWORK = {NAME}")
    start_id = None
    if files.kind is ModelKind.ENCODER_DECODER:
        start_id = files.decoder_start_token_id
        if start_id is None:
            raise ModelError(f"Model {files.name}: config.json has no decoder_start_token_id")
    pad_id = files.pad_token_id or 0
    try:
        network = OrtNetwork(load_graphs(files, progress))
        caps = caps_of(network, files, start_id)
        batching = choose_batching(network, caps, pad_id, start_id)
    except ModelError as error:
        raise ModelError(f"Model {files.name}: {error}") from None
    log.info("its files compute in %s; batching is %s", caps.dtype, batching)
    if caps.dtype != str(dtype).removeprefix("torch.") and config.dtype is not None:
        log.warning("DTYPE = %s has no effect on %s", config.dtype, NAME)
    return PaddedEngine(network, caps, batching, pad_id)


def load_graphs(files: ModelFiles, progress: Progress | None = None) -> Graphs:
    """Open the files that the model's kind needs.

    Raises:
        ModelError: one is missing or broken, or there are several to choose from.
    """
    path = Path(files.path)
    graphs = find_graphs(path, files.kind)
    if graphs is None:
        raise ModelError(
            f"no ONNX files in {path} or its onnx/: expected {expected(files.kind)}; make them with"
            f" `text-generation-server convert-to-onnx {files.name} TARGET` and serve TARGET"
        )
    log.info("serving %s", ", ".join(graphs.names))
    total = sum((path / name).stat().st_size for name in graphs.names)
    opened: dict[str, Graph] = {}
    done = 0
    for name in graphs.names:
        opened[name] = Graph(path / name, torch.get_num_threads())
        done += (path / name).stat().st_size
        if progress is not None:
            progress(done, total)
    encoder = None if graphs.encoder is None else opened[graphs.encoder]
    return Graphs(encoder, opened[graphs.first], opened[graphs.later])


class OrtNetwork:
    """A model's graphs as a `tgis.engines.padded.Network`.

    Raises:
        ModelError: a graph has other inputs and outputs than Optimum's layout.
    """

    def __init__(self, graphs: Graphs) -> None:
        self._encoder, self._first, self._later = graphs
        kind = ModelKind.DECODER_ONLY if graphs.encoder is None else ModelKind.ENCODER_DECODER
        if self._encoder is not None:
            _check_encoder(self._encoder)
        for graph in dict.fromkeys((self._first, self._later)):
            _check_decoder(graph, _FED[kind])
        names = _caches(self._later.inputs, PAST)
        self._own = [name for name in names if ".encoder." not in name]
        self._cross = [name for name in names if ".encoder." in name]
        self._check_caches()
        self.vocab_size = _fixed(self._later, "logits", self._later.outputs["logits"], (2,))[0]

    def forward(self, inputs: Inputs, state: OrtState | None) -> tuple[Tensor, OrtState]:
        """See `Network.forward`."""
        graph = self._first if state is None else self._later
        rows, columns = inputs.token_ids.shape
        encoded = self._encode(inputs) if state is None else state.encoded
        width = columns if state is None else columns + _columns(state.own)
        values = _values(inputs, width, state is not None)
        if encoded is not None:
            values["encoder_hidden_states"] = encoded
        past = {} if state is None else {**state.own, **state.cross}
        for name in _caches(graph.inputs, PAST):
            empty = _shape(graph.inputs[PAST + name], rows, 0)
            values[PAST + name] = past[name] if past else torch.empty(empty)
        wanted: dict[str, tuple[int, ...]] = {"logits": (rows, columns, self.vocab_size)}
        wanted |= self._wanted(self._own, rows, width)
        if state is None and encoded is not None:
            wanted |= self._wanted(self._cross, rows, encoded.shape[1])
        found = graph.run(values, wanted)
        own = {name: found[PRESENT + name] for name in self._own}
        cross = state.cross if state else {name: found[PRESENT + name] for name in self._cross}
        return found["logits"], OrtState(own, cross, encoded)

    def merge(
        self, parts: Sequence[tuple[OrtState, list[int]]], width: int, encoder_width: int
    ) -> OrtState:
        """See `Network.merge`."""

        def pick(name: str, kind: str, size: int) -> Tensor:
            tensors = [(getattr(state, kind)[name], rows) for state, rows in parts]
            return merge_rows(tensors, size, left=kind == "own")

        own = {name: pick(name, "own", width) for name in self._own}
        cross = {name: pick(name, "cross", encoder_width) for name in self._cross}
        encoded = [(state.encoded, rows) for state, rows in parts if state.encoded is not None]
        whole = merge_rows(encoded, encoder_width, left=False) if encoded else None
        return OrtState(own, cross, whole)

    def _encode(self, inputs: Inputs) -> Tensor | None:
        if self._encoder is None:
            return None
        assert inputs.encoder_ids is not None
        assert inputs.encoder_mask is not None
        port = self._encoder.outputs["last_hidden_state"]
        (size,) = _fixed(self._encoder, "last_hidden_state", port, (2,))
        feeds = {"input_ids": inputs.encoder_ids, "attention_mask": inputs.encoder_mask}
        shape = (*inputs.encoder_ids.shape, size)
        return self._encoder.run(feeds, {"last_hidden_state": shape})["last_hidden_state"]

    def _wanted(self, names: list[str], rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        ports = self._later.inputs
        return {PRESENT + name: _shape(ports[PAST + name], rows, columns) for name in names}

    def _check_caches(self) -> None:
        later, first = self._later, self._first
        if not self._own:
            raise ModelError(
                f"{later.name} has no inputs {PAST}N.key and .value: it keeps no cache of what it"
                " has computed, and cannot be served; export it with its cache"
            )
        for graph, names in ((first, [*self._own, *self._cross]), (later, self._own)):
            missing = [name for name in names if PRESENT + name not in graph.outputs]
            if missing:
                raise ModelError(f"{graph.name} has no output {PRESENT}{missing[0]}")
        for name in (*self._own, *self._cross):
            port = later.inputs[PAST + name]
            if len(port.shape) not in _CACHE_DIMS:
                raise ModelError(_unknown_shape(later, PAST + name, port))
            fixed = [dim for dim in range(1, len(port.shape)) if dim != len(port.shape) - 2]
            _fixed(later, PAST + name, port, fixed)


def _values(inputs: Inputs, width: int, has_cache: bool) -> dict[str, Tensor]:
    """What a decoder may ask for, by the name of the input."""
    rows, columns = inputs.token_ids.shape
    mask = inputs.mask
    if mask is None:
        mask = torch.ones(rows, width, dtype=torch.int64)
    values = {
        "input_ids": inputs.token_ids,
        "position_ids": inputs.positions.expand(rows, columns),
        "cache_position": torch.arange(width - columns, width),
        "use_cache_branch": torch.tensor([has_cache]),
        **dict.fromkeys(_OWN_MASKS, mask),
    }
    if inputs.encoder_mask is not None:
        values["encoder_attention_mask"] = inputs.encoder_mask
    return values


def _caches(ports: Mapping[str, Port], prefix: str) -> list[str]:
    """Caches among inputs or outputs, without their prefix."""
    return [name.removeprefix(prefix) for name in ports if name.startswith(prefix)]


def _columns(caches: Mapping[str, Tensor]) -> int:
    return next(iter(caches.values())).shape[-2]


def _shape(port: Port, rows: int, columns: int) -> tuple[int, ...]:
    """A cache's shape; only rows and columns are not the port's own."""
    dims = [dim if isinstance(dim, int) else 0 for dim in port.shape]
    dims[0], dims[-2] = rows, columns
    return tuple(dims)


def _fixed(graph: Graph, name: str, port: Port, dims: Sequence[int]) -> list[int]:
    """The sizes of some dimensions, which must not vary."""
    found = [size for dim in dims if dim < len(port.shape) and _is_size(size := port.shape[dim])]
    if len(found) != len(dims):
        raise ModelError(_unknown_shape(graph, name, port))
    return found


def _is_size(size: int | str | None) -> TypeGuard[int]:
    return isinstance(size, int)


def _unknown_shape(graph: Graph, name: str, port: Port) -> str:
    shape = ", ".join(map(str, port.shape))
    return (
        f"{graph.name}: {name} has the shape [{shape}], which is none of Optimum's layouts that"
        " are supported ([rows, heads, columns, size], heads and size given)"
    )


def _check_encoder(graph: Graph) -> None:
    _check_inputs(graph, graph.inputs.keys() - {"input_ids", "attention_mask"})
    if "last_hidden_state" not in graph.outputs:
        raise ModelError(f"{graph.name} has no output last_hidden_state")


def _check_decoder(graph: Graph, fed: frozenset[str]) -> None:
    unknown = graph.inputs.keys() - fed
    _check_inputs(graph, {name for name in unknown if not _CACHE.fullmatch(name)})
    missing = [
        name for name in ("input_ids", "logits") if name not in {**graph.inputs, **graph.outputs}
    ]
    if missing:
        raise ModelError(f"{graph.name} has no input or output {missing[0]}")


def _check_inputs(graph: Graph, unknown: Iterable[str]) -> None:
    for name in sorted(unknown):
        raise ModelError(f"{graph.name} asks for {name}, an input that is not in Optimum's layout")


@torch.inference_mode()
def caps_of(network: OrtNetwork, files: ModelFiles, start_id: int | None) -> EngineCaps:
    """Sizes as a pass over one token shows them."""
    one = torch.ones(1, 1, dtype=torch.int64)
    inputs = Inputs(one, one - 1, None, None, None, all_logits=False)
    if start_id is not None:
        inputs = inputs._replace(encoder_ids=one, encoder_mask=one)
    try:
        logits, state = network.forward(inputs, None)
    except MemoryError:
        raise
    except Exception as error:  # whatever ONNX Runtime makes of its own file
        raise ModelError(
            f"it cannot compute one token: {str(error).strip().splitlines()[0]}"
        ) from None
    return EngineCaps(
        name=NAME,
        kind=files.kind,
        kv_layout="padded",
        chunked_prefill=False,
        vocab_size=network.vocab_size,
        max_positions=_max_positions(files),
        kv_bytes_per_token=sum(tensor.nbytes for tensor in state.tensors),
        dtype=str(logits.dtype).removeprefix("torch."),
    )


def _max_positions(files: ModelFiles) -> int | None:
    """Graphs do not say whether they have a table of positions, so the model's limit is theirs."""
    if files.kind is ModelKind.DECODER_ONLY:
        return files.max_length
    limit = files.config.get("max_position_embeddings")  # T5 and its like have none
    return limit if isinstance(limit, int) else None
