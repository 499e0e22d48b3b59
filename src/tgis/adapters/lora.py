"""LoRA adapters (PEFT): files -> checked tensors by target module (arXiv:2106.09685).

Shapes are checked by the header, before a tensor is read; nothing else that a file holds is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tgis.adapters.lora_options import LoraOptions, read_options, shown
from tgis.adapters.store import Directory, Refused
from tgis.adapters.tensors import StoredTensor, stored_tensors
from tgis.types import AdapterKind

_PREFIX = "base_model.model."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Half = Literal["a", "b", "whole"]
_SUFFIXES: dict[str, tuple[Half, bool]] = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
    # PEFT saves embeddings and heads that it adapts, as they were before.
    ".base_layer.weight": ("whole", False),
}
"""How a tensor's name ends -> what it is, and whether of an embedding."""


class LoraTarget(Protocol):
    """A weight [out, in] to which LoRA may add; embeddings count as [hidden, vocab]."""

    @property
    def name(self) -> str:
        """Of the module in the checkpoint."""

    @property
    def out_features(self) -> int:
        """Rows of the weight."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""

    @property
    def is_embedding(self) -> bool:
        """Whether it is the table of embeddings."""

    @property
    def sample(self) -> Tensor | None:
        """The first rows of the stored weight, where adapters may bring a copy of it."""


LoraTargets = Mapping[str, LoraTarget]
"""The weights to which LoRA may add, by each name that an adapter may use for one."""


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """Low-rank additions, whole (before ranks split them), by name of the module.

    Attributes:
        pairs: name -> (A [rank, in], B [out, rank], with the scale multiplied in).
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


@dataclass(frozen=True, slots=True)
class LoraRules:
    """What a LoRA adapter must fit.

    Attributes:
        dtype: of the model's arithmetic.
        limit: most bytes of all its tensors.
    """

    targets: LoraTargets
    dtype: torch.dtype
    limit: int


class _Found(NamedTuple):
    """A tensor of the file, and what it is."""

    name: str
    stored: StoredTensor
    module: str  # as the adapter calls it
    target: LoraTarget
    half: Half


def load_lora(directory: Directory, rules: LoraRules) -> Lora:
    """Read and check the LoRA adapter of a directory.

    Raises:
        Refused: it is broken, or not for this model.
    """
    options = read_options(directory.config(), len(rules.targets))
    limit = 4 // rules.dtype.itemsize * rules.limit  # files often hold float32
    halves: dict[str, dict[Half, _Found]] = {}
    for name, stored in stored_tensors(directory, AdapterKind.LORA, limit).items():
        found = _identify(name, stored, rules.targets)
        if found.half == "whole":
            _check_copy(found)
        elif found.half in halves.setdefault(found.target.name, {}):
            raise _refused(f"tensor {shown(name)} is there twice, by another name")
        else:
            halves[found.target.name][found.half] = found
    if not halves:
        raise _refused("there are no LoRA tensors")
    _check_shapes(halves, options, rules)
    return Lora(dict(_read(halves, options, rules.dtype)))


def _identify(name: str, stored: StoredTensor, targets: LoraTargets) -> _Found:
    """What a tensor is, by its name and type."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise _refused(f"tensor {shown(name)} is not supported: it is no matrix of LoRA")
    module = name.removeprefix(_PREFIX).removesuffix(suffix)
    half, is_embedding = _SUFFIXES[suffix]
    target = targets.get(module)
    if target is None or (half == "whole" and target.sample is None):
        raise _refused(f"tensor {shown(name)}: this model has no module that it could belong to")
    if half != "whole" and is_embedding != target.is_embedding:
        kind = "an embedding" if target.is_embedding else "no embedding"
        raise _refused(f"tensor {shown(name)}: in this model that module is {kind}")
    if stored.dtype not in _FLOATS:
        raise _refused(f"tensor {shown(name)} is of {stored.dtype}, not of floating point numbers")
    return _Found(name, stored, module, target, half)


def _check_copy(found: _Found) -> None:
    """A copy of a weight of the model's own must be that weight."""
    target, sample = found.target, found.target.sample
    assert sample is not None
    stored = (target.out_features, target.in_features)
    _expect_shape(found, stored[::-1] if target.is_embedding else stored)
    rows = found.stored.rows(len(sample))
    if not torch.equal(rows.to(sample.dtype), sample):
        raise _refused(
            f"tensor {shown(found.name)} is not the model's: it was trained on another model,"
            " or replaces the weight, which is not supported"
        )


def _check_shapes(
    halves: Mapping[str, Mapping[Half, _Found]], options: LoraOptions, rules: LoraRules
) -> None:
    """Both halves must be there, of the shapes that the model and the options ask for."""
    num_values = 0
    for pair in halves.values():
        if len(pair) < 2:
            (only,) = pair.values()
            raise _refused(f"tensor {shown(only.name)} has no counterpart")
        rank = options.rank(pair["a"].module)
        target = pair["a"].target
        _expect_shape(pair["a"], (rank, target.in_features))
        _expect_shape(pair["b"], (target.out_features, rank))
        num_values += rank * (target.in_features + target.out_features)
    num_bytes = num_values * rules.dtype.itemsize
    if num_bytes > rules.limit:
        raise _refused(f"{num_bytes} bytes exceed the allowed cache size of {rules.limit}")


def _expect_shape(found: _Found, shape: tuple[int, int]) -> None:
    if found.stored.shape != shape:
        raise _refused(
            f"tensor {shown(found.name)} has shape {list(found.stored.shape)},"
            f" but this model and adapter_config.json ask for {list(shape)}"
        )


def _read(
    halves: Mapping[str, Mapping[Half, _Found]], options: LoraOptions, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The tensors, with the scale in B."""
    for name, pair in halves.items():
        scale = options.scale(pair["a"].module)
        yield name, (_values(pair["a"], 1.0, dtype), _values(pair["b"], scale, dtype))


def _values(found: _Found, scale: float, dtype: torch.dtype) -> Tensor:
    values = found.stored.rows(found.stored.shape[0])
    if not values.isfinite().all():
        raise _refused(f"tensor {shown(found.name)} contains non-finite elements")
    converted = (values.float() * scale).to(dtype)
    if not converted.isfinite().all():
        raise _refused(
            f"tensor {shown(found.name)} contains non-finite elements after conversion"
            f" from {found.stored.dtype} to {dtype}"
        )
    return converted


def _refused(message: str) -> Refused:
    return Refused(message, kind=AdapterKind.LORA)
