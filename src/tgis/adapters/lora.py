"""LoRA adapters (PEFT): files -> checked tensors by target module (arXiv:2106.09685)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.adapters.store import Directory, Refused
from tgis.types import AdapterKind

LoraTargets = Mapping[str, tuple[int, int]]
"""The weights to which LoRA may add: name of the module in the checkpoint -> (out, in)."""


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


def load_lora(directory: Directory, rules: LoraRules) -> Lora:
    """Read and check the LoRA adapter of a directory.

    Raises:
        Refused: it is broken, or not for this model.
    """
    raise Refused("LoRA adapters are not supported", kind=AdapterKind.LORA)
