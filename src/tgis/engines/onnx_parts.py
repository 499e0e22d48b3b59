"""The parts of a Transformers model that become ONNX graphs, with Optimum's names.

A decoder takes keys and values as plain tensors and gives them back longer; the cache objects of
Transformers exist within a pass only. All layers keep whole sequences: windows are a matter of the
mask then.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import cache_utils as hf
from transformers.modeling_outputs import BaseModelOutput

from tgis.engines import ort
from tgis.errors import ModelError
from tgis.hub import onnx_files

# Sizes of the examples that graphs are traced with; all differ and none is 0 or 1, so that none is
# taken for another, or for a constant.
_ROWS, _COLUMNS, _PAST, _ENCODED = 2, 3, 5, 7
_LAYERS = (hf.DynamicLayer, hf.DynamicSlidingWindowLayer)

Axes = dict[int, str]
"""Dimensions of any size, by name."""

_IDS: Axes = {0: "batch_size", 1: "sequence_length"}
_TOTAL: Axes = {0: "batch_size", 1: "total_sequence_length"}
_READ: Axes = {0: "batch_size", 1: "encoder_sequence_length"}
_OWN_CACHE: Axes = {0: "batch_size", 2: "past_sequence_length"}
_READ_CACHE: Axes = {0: "batch_size", 2: "encoder_sequence_length"}


class Part(NamedTuple):
    """A graph to be.

    Attributes:
        file: its name.
        module: takes `examples` by name, `past` as a list.
        examples: what it is traced with.
        axes: which dimensions of these vary.
        inputs, outputs: names in the graph, in order.
    """

    file: str
    module: nn.Module
    examples: dict[str, Any]
    axes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]


class _Layer(NamedTuple):
    """Shapes of a layer's keys and values, [heads, size] of each."""

    key: tuple[int, int]
    value: tuple[int, int]


@torch.no_grad()
def parts_of(model: Any) -> list[Part]:
    """What is to be exported of a model.

    Raises:
        ModelError: its cache is not of keys and values alone.
    """
    if model.config.is_encoder_decoder:
        return _encoder_decoder(model)
    ids = torch.ones(1, 2, dtype=torch.int64)
    layers = _layers(model(ids, use_cache=True, return_dict=True).get("past_key_values"))
    decoder = _Decoder(model)
    examples = {"input_ids": _ids(_COLUMNS), "attention_mask": _ids(_PAST + _COLUMNS)}
    axes: dict[str, Any] = {"input_ids": _IDS, "attention_mask": _TOTAL}
    if decoder.takes_positions:
        positions = torch.arange(_PAST, _PAST + _COLUMNS).repeat(_ROWS, 1)
        examples["position_ids"] = positions
        axes["position_ids"] = _IDS
    names = _cache_names(len(layers))
    return [
        Part(
            onnx_files.SINGLE,
            decoder,
            {**examples, "past": _past(layers, _PAST)},
            {**axes, "past": [_OWN_CACHE] * len(names)},
            [*examples, *(ort.PAST + name for name in names)],
            ["logits", *(ort.PRESENT + name for name in names)],
        )
    ]


class _Decoder(nn.Module):
    """A decoder-only model, every pass of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past: list[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """See `torch.nn.Module`."""
        arguments = {"position_ids": position_ids} if self.takes_positions else {}
        cache = _cache(past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **arguments,
        )
        return (output.logits, *_tensors(cache))


def _encoder_decoder(model: Any) -> list[Part]:
    one = torch.ones(1, 1, dtype=torch.int64)
    encoded = model.get_encoder()(input_ids=one, attention_mask=one, return_dict=True)
    hidden = encoded.last_hidden_state
    cache = model(encoder_outputs=encoded, decoder_input_ids=one, use_cache=True).past_key_values
    if not isinstance(cache, hf.EncoderDecoderCache):
        raise ModelError(_no_layout(cache))
    own = _layers(cache.self_attention_cache)
    cross = _layers(cache.cross_attention_cache)
    own_names = _cache_names(len(own), "decoder.")
    cross_names = _cache_names(len(cross), "encoder.")
    read = {
        "encoder_attention_mask": _ids(_ENCODED),
        "input_ids": _ids(_COLUMNS),
        "encoder_hidden_states": hidden.new_ones(_ROWS, _ENCODED, hidden.shape[-1]),
    }
    read_axes = {"encoder_attention_mask": _READ, "input_ids": _IDS, "encoder_hidden_states": _READ}
    presents = [ort.PRESENT + name for name in own_names]
    encoder = Part(
        onnx_files.ENCODER,
        _Encoder(model),
        {"input_ids": _ids(_ENCODED), "attention_mask": _ids(_ENCODED)},
        {"input_ids": _READ, "attention_mask": _READ},
        ["input_ids", "attention_mask"],
        ["last_hidden_state"],
    )
    first = Part(
        onnx_files.FIRST,
        _FirstPass(model),
        {**read, "attention_mask": _ids(_COLUMNS)},
        {**read_axes, "attention_mask": _IDS},
        [*read, "attention_mask"],
        ["logits", *presents, *(ort.PRESENT + name for name in cross_names)],
    )
    del read["encoder_hidden_states"], read_axes["encoder_hidden_states"]
    later = Part(
        onnx_files.LATER,
        _LaterPass(model, hidden.shape[-1]),
        {
            **read,
            "attention_mask": _ids(_PAST + _COLUMNS),
            "past": [*_past(own, _PAST), *_past(cross, _ENCODED)],
        },
        {
            **read_axes,
            "attention_mask": _TOTAL,
            "past": [_OWN_CACHE] * len(own_names) + [_READ_CACHE] * len(cross_names),
        },
        [*read, "attention_mask", *(ort.PAST + name for name in [*own_names, *cross_names])],
        ["logits", *presents],
    )
    return [encoder, first, later]


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `torch.nn.Module`."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        hidden: Tensor = output.last_hidden_state
        return hidden


class _FirstPass(nn.Module):
    """The decoder of an encoder-decoder model before it has a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        encoder_attention_mask: Tensor,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `torch.nn.Module`."""
        own, cross = _cache(None), _cache(None)
        logits = _decode(
            self.model,
            input_ids,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            hf.EncoderDecoderCache(own, cross),
        )
        return (logits, *_tensors(own), *_tensors(cross))


class _LaterPass(nn.Module):
    """The same with a cache, which holds all that is needed of the encoder's output."""

    def __init__(self, model: Any, size: int) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(
        self,
        encoder_attention_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """See `torch.nn.Module`."""
        half = len(past) // 2
        own, cross = _cache(past[:half]), _cache(past[half:])
        both = hf.EncoderDecoderCache(own, cross)
        both.is_updated = dict.fromkeys(range(half // 2), True)
        unread = past[0].new_zeros(*encoder_attention_mask.shape, self.size)
        logits = _decode(
            self.model, input_ids, attention_mask, unread, encoder_attention_mask, both
        )
        return (logits, *_tensors(own))


def _decode(
    model: Any,
    input_ids: Tensor,
    mask: Tensor,
    encoded: Tensor,
    encoder_mask: Tensor,
    cache: Any,
) -> Tensor:
    output = model(
        decoder_input_ids=input_ids,
        decoder_attention_mask=mask,
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=encoder_mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    logits: Tensor = output.logits
    return logits


def _cache(past: list[Tensor] | None) -> Any:
    cache = hf.DynamicCache()
    for number in range(0, len(past or ()), 2):
        assert past is not None
        cache.update(past[number], past[number + 1], number // 2)
    return cache


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _layers(cache: Any) -> list[_Layer]:
    layers = getattr(cache, "layers", [])
    if not layers or not all(type(layer) in _LAYERS and layer.is_initialized for layer in layers):
        raise ModelError(_no_layout(cache))

    def sizes(tensor: Tensor) -> tuple[int, int]:
        return tensor.shape[1], tensor.shape[3]

    return [_Layer(sizes(layer.keys), sizes(layer.values)) for layer in layers]


def _no_layout(cache: Any) -> str:
    kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
    what = ", ".join(kinds) or type(cache).__name__
    return (
        f"its cache ({what}) is not of keys and values alone, and the ONNX layout has no names"
        " for anything else"
    )


def _past(layers: list[_Layer], columns: int) -> list[Tensor]:
    sizes = [size for layer in layers for size in layer]
    return [torch.ones(_ROWS, heads, columns, size) for heads, size in sizes]


def _cache_names(num_layers: int, part: str = "") -> list[str]:
    return [f"{n}.{part}{kind}" for n in range(num_layers) for kind in ("key", "value")]


def _ids(columns: int) -> Tensor:
    return torch.ones(_ROWS, columns, dtype=torch.int64)
