"""What a compiled network calls without looking inside: layers, and attention over the cache.

To PyTorch's compiler these are operators that make a tensor of a known shape of another one.
Weights are packed in layouts that it cannot read, rows may have adapters, and keys and values lie
in memory that it need not know of: attention alone writes a layer's part of the cache, and what it
returns is always used, so that no call can be left out or moved.

The operators say which layer; the step under way knows the layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.models.inputs import StepInputs
from tgis.models.kv_cache import LayerCache
from tgis.models.lora import Adaptable

Attention = Callable[[Tensor, LayerCache, StepInputs], Tensor]
"""See the package `attention`."""


@dataclass(slots=True, eq=False)
class Step:
    """What the operators of one step work with."""

    layers: Sequence[Adaptable]
    head: Adaptable
    attention: Sequence[Attention]
    caches: Sequence[LayerCache]
    inputs: StepInputs
    error: Exception | None = None  # what an operator raised; compiled code loses its type


_under_way: list[Step] = []  # or none


@contextmanager
def under_way(step: Step) -> Iterator[None]:
    """Operators called within work for this step.

    Raises:
        Exception: what one of them raised.
    """
    _under_way.append(step)
    try:
        yield
    except RuntimeError:
        if step.error is None:
            raise
        raise step.error from None
    finally:
        _under_way.remove(step)


def _layer(x: Tensor, site: int, width: int) -> Tensor:
    step = _under_way[-1]
    return _noting(step, lambda: step.layers[site](x, step.inputs.lora))


def _head(x: Tensor, width: int) -> Tensor:
    step = _under_way[-1]
    lora = step.inputs.lora
    if lora is not None:
        lora = lora.index_select(0, step.inputs.logits_index)
    return _noting(step, lambda: step.head(x, lora))


def _attention(qkv: Tensor, layer: int, width: int) -> Tensor:
    step = _under_way[-1]
    return _noting(step, lambda: step.attention[layer](qkv, step.caches[layer], step.inputs))


def _noting(step: Step, compute: Callable[[], Tensor]) -> Tensor:
    try:
        return compute()
    except Exception as error:
        step.error = error
        raise


# len() would make a constant of a number of rows that is to stay open.


def _rows(x: Tensor, _which: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width)


def _logits(x: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width, dtype=torch.float32)


_LIBRARY = torch.library.Library("tgis", "DEF")  # type: ignore[no-untyped-call]


def _operator(
    schema: str, compute: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Define an operator: what it does, and what the compiler is told of its result."""
    name = _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tgis::{name}", shape)
    operator: Callable[..., Tensor] = getattr(torch.ops.tgis, name)
    return operator


layer = _operator("layer(Tensor x, int site, int width) -> Tensor", _layer, _rows)
"""(rows [n, in], which of `Step.layers`, out) -> [n, out]"""

head = _operator("head(Tensor x, int width) -> Tensor", _head, _logits)
"""(rows [n, hidden], out) -> logits, float32 [n, out]"""

attention = _operator("attention(Tensor qkv, int layer, int width) -> Tensor", _attention, _rows)
"""(q|k|v [T, ...], which layer, out) -> [T, out]; writes the layer's keys and values"""
