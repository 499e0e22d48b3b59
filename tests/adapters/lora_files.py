"""LoRA adapters in a store: PEFT's files written by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tgis.adapters.load import Rules, load
from tgis.adapters.lora import Lora, LoraRules, LoraTarget
from tgis.adapters.store import Store

PREFIX = "base_model.model."
VOCAB, HIDDEN, RANK = 11, 6, 2


class Target(NamedTuple):
    name: str
    out_features: int
    in_features: int
    is_embedding: bool = False
    sample: Tensor | None = None


EMBEDDING = torch.arange(3.0 * HIDDEN).view(3, HIDDEN)
TARGETS: dict[str, LoraTarget] = {
    "model.embed": Target("model.embed", HIDDEN, VOCAB, True, EMBEDDING),
    "model.0.q": Target("model.0.q", 8, HIDDEN),
    "model.0.down": Target("model.0.down", HIDDEN, 4),
    "0.q": Target("model.0.q", 8, HIDDEN),
    "lm_head": Target("lm_head", VOCAB, HIDDEN, False, EMBEDDING + 1),
}

CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6}


def pair(module: str, rank: int = RANK, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of one module."""
    target = TARGETS[module]
    generator = torch.Generator().manual_seed(seed)
    ends = ("_embedding_A", "_embedding_B") if target.is_embedding else ("_A.weight", "_B.weight")
    shapes = ((rank, target.in_features), (target.out_features, rank))
    return {
        f"{PREFIX}{module}.lora{end}": torch.randn(shape, generator=generator)
        for end, shape in zip(ends, shapes, strict=True)
    }


def write(
    root: Path,
    tensors: Mapping[str, Tensor],
    file: str = "adapter_model.safetensors",
    **config: Any,
) -> None:
    """An adapter of id `a`."""
    (root / "a").mkdir(exist_ok=True)
    (root / "a" / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    if file.endswith(".bin"):
        torch.save(dict(tensors), root / "a" / file)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, root / "a" / file)


def read(
    root: Path,
    targets: Mapping[str, LoraTarget] = TARGETS,
    dtype: torch.dtype = torch.float32,
    limit: int = 1 << 20,
    adapter_id: str = "a",
) -> Lora:
    """As the core loads it."""
    loaded = load(Store(str(root)), adapter_id, Rules(None, LoraRules(targets, dtype, limit)), None)
    assert loaded is not None
    assert isinstance(loaded.adapter, Lora)
    return loaded.adapter
