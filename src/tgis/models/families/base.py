"""What a family's table says: how its `config.json` is read, and what its tensors are called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tgis.models.model_config import ModelConfig
from tgis.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class FusedQkv:
    """Queries, keys and values in one checkpoint matrix.

    Layouts of its rows, D = head_dim:
        stacked  all query heads, then all key heads, then all value heads, D rows each
        grouped  per key head: its query heads, its key, its value, D rows each
    """

    name: str
    layout: Literal["stacked", "grouped"]


class SeparateQkv(NamedTuple):
    """Queries, keys and values in checkpoint matrices of their own."""

    q: str
    k: str
    v: str


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Checkpoint names of a network's parameters, without ".weight" and ".bias".

    Those of a block are relative to `block`, in which {} is the layer's number. None: the family
    has no such parameter. How each splits over ranks follows from what it is: see `weights.py`.
    """

    embedding: str
    block: str
    attention_norm: str
    qkv: FusedQkv | SeparateQkv
    attention_out: str
    mlp_in: tuple[str, ...]  # (gate, up) or (up,)
    mlp_out: str
    final_norm: str
    heads: tuple[str, ...] = ("lm_head",)  # the first that is stored; no prefix precedes it
    mlp_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    positions: str | None = None
    embedding_norm: str | None = None
    prefixes: tuple[str, ...] = ("",)  # the first that fits the embedding precedes every name
    transposed: bool = False  # block matrices are stored [in, out]
    ignored: tuple[str, ...] = ()  # patterns of tensors that are not parameters


class Family(NamedTuple):
    """One family: `read` turns a configuration into the network and its names."""

    model_types: tuple[str, ...]
    read: Callable[[ModelConfig], tuple[DecoderSpec, TensorNames]]
