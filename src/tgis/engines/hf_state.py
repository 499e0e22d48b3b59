"""The caches of Transformers models as states of padded batches.

Attention layers hold keys and values [rows, heads, columns, size] and, in layers with a window,
only the last columns; recurrent layers hold a state per row without columns. All of them can be
merged row by row. What is of another kind stays as it is, and its batch of one row.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import cache_utils as hf

from tgis.engines.padded import merge_rows

Parts = Sequence[tuple[Any, list[int]]]
"""Objects with the rows wanted of each."""


@dataclass(slots=True)
class HfState:
    """See `tgis.engines.padded.State`.

    Attributes:
        name: the argument of the model's `forward` that takes the cache.
        cache: a `Cache`, or whatever the model itself keeps.
        encoded: the encoder's output [rows, encoder columns, size]; encoder-decoder only.
    """

    name: str
    cache: Any
    encoded: Tensor | None = None

    def save(self) -> Callable[[], None]:
        """See `State.save`."""
        layers = _layers(self.cache)
        if any(type(layer) not in _MERGE for layer in layers) or not layers:
            kept = copy.deepcopy(self.cache)

            def restore_whole() -> None:
                self.cache = kept

            return restore_whole
        saved = [(layer, _contents(layer)) for layer in layers]

        def restore() -> None:
            for layer, contents in saved:
                layer.__dict__.update(contents)

        return restore

    def row_bytes(self) -> tuple[int, int]:
        """Bytes of one row: for each token, and whatever its length."""
        per_token = fixed = 0
        for layer in _layers(self.cache):
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if tensor is not None and tensor.ndim == 4:
                    per_token += tensor.shape[1] * tensor.shape[3] * tensor.itemsize
            for states in (
                getattr(layer, "conv_states", {}),
                getattr(layer, "recurrent_states", {}),
            ):
                fixed += sum(state[0].nbytes for state in states.values() if state is not None)
        if self.encoded is not None:
            per_token += self.encoded.shape[-1] * self.encoded.itemsize
        return per_token, fixed


def merge(parts: Sequence[tuple[HfState, list[int]]], width: int, encoder_width: int) -> HfState:
    """See `Network.merge`.

    Raises:
        TypeError: there is a layer that cannot be merged.
    """
    first = parts[0][0]
    caches = [(state.cache, rows) for state, rows in parts]
    if not isinstance(first.cache, hf.EncoderDecoderCache):
        return HfState(first.name, _merge_cache(caches, width, left=True))
    own = [(cache.self_attention_cache, rows) for cache, rows in caches]
    cross = [(cache.cross_attention_cache, rows) for cache, rows in caches]
    merged = copy.copy(first.cache)
    merged.self_attention_cache = _merge_cache(own, width, left=True)
    merged.cross_attention_cache = _merge_cache(cross, encoder_width, left=False)
    merged.is_updated = dict(first.cache.is_updated)
    encoded = [(state.encoded, rows) for state, rows in parts if state.encoded is not None]
    return HfState(first.name, merged, merge_rows(encoded, encoder_width, left=False))


def _layers(cache: Any) -> list[Any]:
    if isinstance(cache, hf.EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers) if isinstance(cache, hf.Cache) else []


def _contents(layer: Any) -> dict[str, Any]:
    """What a layer holds. Tensors are replaced by new ones in a pass, but for recurrent states."""
    contents = dict(layer.__dict__)
    for name, value in contents.items():
        if isinstance(value, dict):
            contents[name] = {
                key: item.clone() if isinstance(item, Tensor) else item
                for key, item in value.items()
            }
    return contents


def _merge_cache(parts: Parts, width: int, left: bool) -> Any:
    merged = copy.copy(parts[0][0])
    rows = [rows for _, rows in parts]
    merged.layers = []
    for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
        layer = copy.copy(layers[0])
        if type(layer) not in _MERGE:
            raise TypeError(f"{type(layer).__name__} cannot be merged")
        for merge_kind in _MERGE[type(layer)]:
            merge_kind(layer, list(zip(layers, rows, strict=True)), width, left)
        merged.layers.append(layer)
    return merged


def _merge_attention(layer: Any, parts: Parts, width: int, left: bool) -> None:
    if not layer.is_initialized:  # it uses another layer's keys and values
        return
    layer.keys = merge_rows([(part.keys, rows) for part, rows in parts], width, left=left)
    layer.values = merge_rows([(part.values, rows) for part, rows in parts], width, left=left)


def _merge_window(layer: Any, parts: Parts, width: int, left: bool) -> None:
    """Only the last columns of a window are there; the newest token itself is not one of them."""
    _merge_attention(layer, parts, min(width, layer.sliding_window - 1), left)
    layer.cumulative_length = width


def _merge_recurrent(layer: Any, parts: Parts, width: int, left: bool) -> None:
    for name in ("conv_states", "recurrent_states"):
        states = {
            key: None
            if state is None
            else merge_rows([(getattr(part, name)[key], rows) for part, rows in parts])
            for key, state in getattr(layer, name).items()
        }
        setattr(layer, name, states)
    layer.has_previous_state = dict(layer.has_previous_state)


_MERGE: dict[type, tuple[Callable[[Any, Parts, int, bool], None], ...]] = {
    hf.DummyLayer: (),
    hf.DynamicLayer: (_merge_attention,),
    hf.DynamicSlidingWindowLayer: (_merge_window,),
    hf.LinearAttentionLayer: (_merge_recurrent,),
    hf.LinearAttentionAndFullAttentionLayer: (_merge_recurrent, _merge_attention),
    hf.LinearAttentionAndSlidingWindowAttentionLayer: (_merge_recurrent, _merge_window),
}
