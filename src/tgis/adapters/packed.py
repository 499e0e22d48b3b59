"""Adapters as bytes, for the other processes of a model that is split."""

from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from tgis.adapters.load import Adapter
from tgis.adapters.lora import Lora
from tgis.adapters.prompts import SoftPrompt
from tgis.types import AdapterKind


class Packed(NamedTuple):
    """An adapter's kind, and its tensors in the safetensors format."""

    kind: AdapterKind
    data: bytes


def pack(adapter: Adapter) -> Packed:
    """Make bytes of an adapter."""
    if isinstance(adapter, SoftPrompt):
        parts = {"decoder": adapter.decoder, "encoder": adapter.encoder}
        return Packed(AdapterKind.PROMPT, save({k: t for k, t in parts.items() if t is not None}))
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        tensors |= {f"{name}:a": a.contiguous(), f"{name}:b": b.contiguous()}
    return Packed(AdapterKind.LORA, save(tensors))


def unpack(packed: Packed) -> Adapter:
    """What `pack` was given."""
    tensors = load(packed.data)
    if packed.kind is AdapterKind.PROMPT:
        return SoftPrompt(tensors.get("decoder"), tensors.get("encoder"))
    names = dict.fromkeys(key.rpartition(":")[0] for key in tensors)
    return Lora({name: (tensors[f"{name}:a"], tensors[f"{name}:b"]) for name in names})
