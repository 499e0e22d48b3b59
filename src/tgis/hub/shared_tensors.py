"""Tensors of one checkpoint that share memory, and which of their names are kept.

As safetensors and TGIS do it, but for one thing: only a tensor that *is* another is left out. One
that is a part of another's memory is written in full, so that no value is lost.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tgis.errors import ModelError


def duplicates(tensors: Mapping[str, torch.Tensor], config: Path) -> dict[str, str]:
    """Names that are left out, each with the name that is kept for the same tensor.

    Kept is the name of a tensor that covers its storage; of several, the first in the alphabet that
    the architecture does not derive from another.

    Args:
        tensors: of one file.
        config: path of config.json, which names the architecture.

    Raises:
        ModelError: tensors overlap, and none of them covers their storage.
    """
    removed: dict[str, str] = {}
    derived: re.Pattern[str] | None = None
    for names in overlapping(tensors):
        complete = [name for name in names if _is_complete(tensors[name])]
        if not complete:
            raise ModelError(
                "Error while trying to find names to remove to save state dict, but found no"
                f" suitable name to keep for saving amongst: {names}. None is covering the entire"
                " storage."
            )
        for same in _same(complete, tensors):
            derived = derived or _derived_names(config)
            kept = min(same, key=lambda name: (bool(derived and derived.search(name)), name))
            removed |= {name: kept for name in same if name != kept}
    return removed


def overlapping(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Groups of two or more sorted names whose tensors share bytes."""
    storages: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            start, stop = _extent(tensor)
            storages[tensor.untyped_storage().data_ptr()].append((start, stop, name))
    for extents in storages.values():
        group: list[str] = []
        end = 0
        for start, stop, name in sorted(extents):
            if start >= end:
                if len(group) > 1:
                    yield sorted(group)
                group = []
            group.append(name)
            end = max(end, stop)
        if len(group) > 1:
            yield sorted(group)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the first after it."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _is_complete(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    return tensor.data_ptr() == storage.data_ptr() and tensor.nbytes == storage.nbytes()


def _same(names: list[str], tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of two or more names of tensors that are the same in every respect."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in names:
        tensor = tensors[name]
        groups[tensor.dtype, tuple(tensor.shape), tensor.stride()].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _derived_names(config: Path) -> re.Pattern[str]:
    """Matches names of weights that Transformers' class of the model takes from other weights."""
    try:
        architecture = json.loads(config.read_bytes())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        architecture = ""
    import transformers

    keys: list[str] = []
    model = getattr(transformers, str(architecture), None)
    for attribute in ("_tied_weights_keys", "_keys_to_ignore_on_load_missing"):
        keys += [str(key) for key in getattr(model, attribute, None) or ()]
    return re.compile("|".join(f"(?:{key})" for key in keys) or "(?!)")
