"""Soft prompts in models of Transformers: embeddings spliced in where ids would be looked up."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from tgis.engines.padded import Inputs, Patch
from tgis.engines.probe import TOLERANCE

log = logging.getLogger(__name__)

_TRIAL_TOKENS = 5
_TRIAL_PATCH = 2


class Embeddings:
    """The input embeddings of a model; None where there is no telling which they are.

    Attributes:
        encoder: of the encoder.
        decoder: of the decoder, or of the only stack.
        size: of one embedding.
    """

    def __init__(self, model: Any) -> None:
        is_seq2seq = bool(model.config.is_encoder_decoder)
        whole = _find(model)
        self.decoder = (_find(model.get_decoder()) or whole) if is_seq2seq else whole
        self.encoder = (_find(model.get_encoder()) or whole) if is_seq2seq else None
        self.size: int | None = None
        if self.decoder is not None and isinstance(self.decoder.weight, Tensor):
            self.size = int(self.decoder.weight.shape[1])


def _find(stack: Any) -> nn.Module | None:
    """What `get_input_embeddings` says, else the only table as large as the vocabulary."""
    try:
        found = stack.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    if found is None:
        vocab_size = getattr(stack.config, "vocab_size", None)
        tables = [
            module
            for module in stack.modules()
            if isinstance(module, nn.Embedding) and module.num_embeddings == vocab_size
        ]
        found = tables[0] if len(tables) == 1 else None
    return found if getattr(found, "weight", None) is not None else None


def patched(table: nn.Module, ids: Tensor, patches: tuple[Patch, ...]) -> Tensor:
    """Embeddings [n, q, hidden] of ids, but for what is patched."""
    embeddings: Tensor = table(ids)
    for row, column, values in patches:
        embeddings[row, column : column + len(values)] = values
    return embeddings


@torch.inference_mode()
def takes_patches(network: Any, embeddings: Embeddings, dtype: str, start_id: int | None) -> bool:
    """Whether the model computes from embeddings what it computes from ids, by two tiny passes."""
    ids = torch.arange(1, _TRIAL_TOKENS + 1)[None]
    inputs = Inputs(ids, ids - 1, None, None, None, all_logits=True)
    if start_id is not None:
        inputs = inputs._replace(encoder_ids=ids, encoder_mask=torch.ones_like(ids))
    if embeddings.decoder is None or (start_id is not None and embeddings.encoder is None):
        return False
    try:
        patch = Patch(0, 0, patched(embeddings.decoder, ids[:, :_TRIAL_PATCH], ())[0])
        own = inputs._replace(patches=(patch,))
        if embeddings.encoder is not None:
            patch = Patch(0, 0, patched(embeddings.encoder, ids[:, :_TRIAL_PATCH], ())[0])
            own = own._replace(encoder_patches=(patch,))
        expected, _ = network.forward(inputs, None)
        found, _ = network.forward(own, None)
    except Exception as error:  # whatever a model makes of embeddings
        log.debug("the model does not take embeddings: %r", error)
        return False
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) <= TOLERANCE[dtype] * scale
