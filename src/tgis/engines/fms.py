"""The IBM FMS engine: Hugging Face checkpoints that the library `ibm-fms` can load.

Its decoders take and give keys and values as tensors [rows, heads, columns, size], and a mask of
their own making or ours.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgis.config import Config
from tgis.engines.base import EngineCaps
from tgis.engines.fms_families import FAMILIES, FREE_HEADS, SCALED_ROPE, VALUES
from tgis.engines.padded import Inputs, PaddedEngine, merge_rows
from tgis.engines.probe import choose_batching
from tgis.errors import ConfigError, ModelError
from tgis.hub.headers import read_header
from tgis.hub.safetensors import Progress
from tgis.types import ModelFiles

log = logging.getLogger(__name__)

NAME = "ibm_fms"
INSTALL = "pip install 'tgis[fms]'"
ELSEWHERE = "DEPLOYMENT_FRAMEWORK = tgis_native or hf_transformers serves such models"


@dataclass(slots=True)
class FmsState:
    """See `tgis.engines.padded.State`: keys and values of each layer."""

    layers: list[tuple[Tensor, Tensor]]

    def save(self) -> Callable[[], None]:
        """See `State.save`: a pass makes new tensors and leaves these alone."""
        return lambda: None


def load(
    config: Config, files: ModelFiles, dtype: torch.dtype, progress: Progress | None = None
) -> PaddedEngine[FmsState]:
    """Load a model with IBM's Foundation Model Stack.

    Raises:
        ConfigError: the library is not installed.
        ModelError: it does not serve such a model, or cannot load this one.
    """
    get_model = _library()
    _check(files)
    rope = _rope(files.config)
    # With Transformers 5 the library does not find this one itself.
    scaling = {"rope_scaling": rope} if rope.get("rope_type") == SCALED_ROPE[0] else {}
    try:
        with redirect_stdout(StringIO()):  # it prints
            model = get_model(
                "hf_pretrained",
                model_path=files.path,
                device_type="cpu",
                data_type=dtype,
                **scaling,
            )
    except Exception as error:  # whatever the library makes of a checkpoint
        what = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"Model {files.name}: {NAME} cannot load it: {type(error).__name__}: {what}"
        ) from error
    _check_complete(model, files)
    if progress is not None:
        progress(1, 1)
    network = FmsNetwork(model.eval())
    pad_id = files.pad_token_id or 0
    try:
        caps = _caps(network, files, dtype)
        batching = choose_batching(network, caps, pad_id, None)
    except ModelError as error:
        raise ModelError(f"Model {files.name} ({type(model).__name__}): {error}") from None
    log.info("%s of ibm-fms; batching is %s", type(model).__name__, batching)
    return PaddedEngine(network, caps, batching, pad_id)


class FmsNetwork:
    """A model of the library as a `tgis.engines.padded.Network`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def forward(self, inputs: Inputs, state: FmsState | None) -> tuple[Tensor, FmsState]:
        """See `Network.forward`."""
        logits, layers = self._model(
            inputs.token_ids,
            position_ids=inputs.positions,
            past_key_value_states=None if state is None else state.layers,
            use_cache=True,
            last_n_tokens=0 if inputs.all_logits else 1,
            mask=_mask(inputs, state),
            is_causal_mask=False,
        )
        return logits, FmsState(list(layers))

    def merge(
        self, parts: Sequence[tuple[FmsState, list[int]]], width: int, encoder_width: int
    ) -> FmsState:
        """See `Network.merge`."""

        def pick(layer: int, which: int) -> Tensor:
            return merge_rows([(state.layers[layer][which], rows) for state, rows in parts], width)

        num_layers = len(parts[0][0].layers)
        return FmsState([(pick(layer, 0), pick(layer, 1)) for layer in range(num_layers)])


def _mask(inputs: Inputs, state: FmsState | None) -> Tensor:
    """bool [rows or 1, 1, columns, all columns]: which tokens each token reads.

    Padding reads itself, for a softmax over nothing is not a number.
    """
    columns = inputs.token_ids.shape[1]
    width = columns + (0 if state is None else state.layers[0][0].shape[-2])
    own = torch.arange(width - columns, width)[:, None]
    read = torch.arange(width)
    mask = (read <= own)[None]
    if inputs.mask is not None:
        mask = mask & inputs.mask.bool()[:, None, :] | (read == own)
    return mask[:, None]


def _library() -> Callable[..., Any]:
    try:
        from fms.models import get_model
    except ImportError as error:
        raise ConfigError(
            f"DEPLOYMENT_FRAMEWORK = {NAME} needs ibm-fms ({error}): {INSTALL}"
        ) from None
    loader: Callable[..., Any] = get_model
    return loader


def _check(files: ModelFiles) -> None:
    """Refuse what the library does not load, or loads and computes in another way.

    Raises:
        ModelError: such a model.
    """
    if files.model_type not in FAMILIES:
        raise ModelError(
            f"Unknown model type {files.model_type} passed to {NAME} engine. (It serves"
            f" {', '.join(FAMILIES)}.) {ELSEWHERE}"
        )
    if (found := (files.config.get("architectures") or [None])[0]) != FAMILIES[files.model_type]:
        raise ModelError(
            f"Model {files.name}: architectures in config.json begins with {found}; {NAME} serves"
            f" {FAMILIES[files.model_type]}"
        )
    if files.quantization is not None:
        raise ModelError(
            f"Model {files.name}: {files.quantization.get('quant_method')} quantization not"
            f" supported by {NAME} engine"
        )
    for key, value in _unserved(files.config).items():
        raise ModelError(
            f"Model {files.name}: {NAME} does not support {key} = {value}; {ELSEWHERE}"
        )


def _unserved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model that the library would ignore, or stumble over."""
    found: dict[str, Any] = {}
    kind = _rope(config).get("rope_type", "default")
    if kind != "default" and (kind, config["model_type"]) != SCALED_ROPE:
        found["rope_type"] = kind
    window = config.get("sliding_window")
    if window is not None and window < config.get("max_position_embeddings", window + 1):
        found["sliding_window"] = window
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    is_free = config["model_type"] in FREE_HEADS
    if size and heads and size * heads != config.get("hidden_size") and not is_free:
        found["head_dim"] = size
    for key, values in VALUES.get(config["model_type"], {}).items():
        if config.get(key, values[0]) not in values:
            found[key] = config.get(key)
    return found


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary positions are scaled, under the names of today."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    return rope


def _check_complete(model: torch.nn.Module, files: ModelFiles) -> None:
    """The library leaves memory as it is where a weight is missing.

    Raises:
        ModelError: the files hold fewer numbers than the model has.
    """
    held = sum(
        math.prod(info.shape)
        for name in files.weights
        for info in read_header(Path(files.path, name)).values()
    )
    distinct = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    needed = sum(parameter.numel() for parameter in distinct.values())
    if held < needed:
        raise ModelError(
            f"Model {files.name}: weights are missing: the model has {needed} numbers, its files"
            f" {held}"
        )


@torch.inference_mode()
def _caps(network: FmsNetwork, files: ModelFiles, dtype: torch.dtype) -> EngineCaps:
    """Sizes as a pass over one token shows them."""
    one = torch.ones(1, 1, dtype=torch.int64)
    logits, state = network.forward(Inputs(one, one - 1, None, None, None, all_logits=False), None)
    return EngineCaps(
        name=NAME,
        kind=files.kind,
        kv_layout="padded",
        chunked_prefill=False,
        vocab_size=logits.shape[-1],
        max_positions=files.max_length,
        kv_bytes_per_token=sum(k.nbytes + v.nbytes for k, v in state.layers),
        dtype=str(dtype).removeprefix("torch."),
    )
