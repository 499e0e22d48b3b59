"""Random LoRA adapters for any network, and `transformers` with their updates merged in."""

import copy
from collections.abc import Iterable

import torch
import transformers
from torch import Tensor

from tgis.adapters.lora import Lora, LoraTarget
from tgis.engines.base import Engine

Merged = transformers.PreTrainedModel

HEADS = ("lm_head", "embed_out")  # what a head is called in files and in modules may differ


def targets(engine: Engine) -> dict[str, LoraTarget]:
    """What an engine's LoRA may add to, each once, by name in the checkpoint."""
    assert engine.caps.lora_targets is not None
    return {target.name: target for target in engine.caps.lora_targets.values()}


def random_lora(found: Iterable[LoraTarget], ranks: tuple[int, ...] = (4,), seed: int = 0) -> Lora:
    """An adapter of these targets, whose updates are about as large as the weights.

    Args:
        ranks: of the targets, by turns.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for number, target in enumerate(found):
        rank = ranks[number % len(ranks)]
        a = torch.randn(rank, target.in_features, generator=generator)
        b = torch.randn(target.out_features, rank, generator=generator)
        # A token's column of an embedding's A is not summed over the vocabulary.
        width = 1 if target.is_embedding else target.in_features
        pairs[target.name] = (a, b * 0.5 * (width * rank) ** -0.5)
    return Lora(pairs)


@torch.no_grad()
def merged(oracle: Merged, lora: Lora, found: dict[str, LoraTarget]) -> Merged:
    """A copy of the oracle with the updates in its weights."""
    model = copy.deepcopy(oracle)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:  # an update of one is none of the other
        head.weight = torch.nn.Parameter(head.weight.clone())
    for name, (a, b) in lora.pairs.items():
        module = head if name in HEADS else model.get_submodule(name)
        update = b @ a
        is_turned = found[name].is_embedding or isinstance(
            module, transformers.pytorch_utils.Conv1D
        )
        module.weight += update.T if is_turned else update
    return model


@torch.no_grad()
def logits(model: Merged, ids: list[int]) -> Tensor:
    """Logits after every token, float32 [len(ids), vocab]."""
    found: Tensor = model(torch.tensor([ids])).logits[0]
    return found.float()
