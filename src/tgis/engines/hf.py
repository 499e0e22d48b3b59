"""The Transformers engine: every causal or encoder-decoder model that Transformers can load."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from tgis.config import Config
from tgis.engines import hf_state
from tgis.engines.base import EngineCaps
from tgis.engines.hf_load import load_model
from tgis.engines.hf_positions import number_tokens
from tgis.engines.hf_prompts import Embeddings, patched, takes_patches
from tgis.engines.hf_state import HfState
from tgis.engines.padded import Inputs, PaddedEngine
from tgis.engines.probe import choose_batching
from tgis.errors import ModelError
from tgis.hub.safetensors import Progress
from tgis.types import ModelFiles, ModelKind

log = logging.getLogger(__name__)

NAME = "hf_transformers"
# The names under which models of Transformers hand out their caches and take them back.
_CACHE_NAMES = ("past_key_values", "cache_params", "state")
# State that does not grow with the sequence is accounted for as if spread over so many tokens.
_SPREAD_TOKENS = 256
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_BATCHING = {
    "padded": "all sequences share a pass",
    "aligned": "only sequences of equal length share a pass: the model takes no position ids",
    "single": "every sequence is computed by itself: the model's cache cannot be merged",
}


def load(
    config: Config, files: ModelFiles, dtype: torch.dtype, progress: Progress | None = None
) -> PaddedEngine[HfState]:
    """Load a model with Transformers.

    Raises:
        ModelError: Transformers cannot load it, or it cannot be served token by token.
    """
    model = load_model(config, files, dtype, progress)
    network = HfNetwork(model)
    pad_id = files.pad_token_id or 0
    start_id = None
    if files.kind is ModelKind.ENCODER_DECODER:
        start_id = files.decoder_start_token_id
        if start_id is None:
            raise ModelError(f"Model {files.name}: config.json has no decoder_start_token_id")
    try:
        caps = _caps(network, model, files, dtype, start_id)
        batching = choose_batching(network, caps, pad_id, start_id)
        if takes_patches(network, network.embeddings, caps.dtype, start_id):
            caps = replace(caps, soft_prompt_size=network.embeddings.size)
    except ModelError as error:
        raise ModelError(f"Model {files.name} ({type(model).__name__}): {error}") from None
    log.info("%s: %s", type(model).__name__, _BATCHING[batching])
    return PaddedEngine(network, caps, batching, pad_id)


class HfNetwork:
    """A model of Transformers as a `tgis.engines.padded.Network`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keeps_logits = "logits_to_keep" in accepted
        self._is_seq2seq = bool(model.config.is_encoder_decoder)
        self._positions = number_tokens(model) if self._is_seq2seq else None
        self.embeddings = Embeddings(model)

    def forward(self, inputs: Inputs, state: HfState | None) -> tuple[Tensor, HfState]:
        """See `Network.forward`."""
        arguments: dict[str, Any] = {"use_cache": True}
        encoded = None
        if self._is_seq2seq:
            encoded = self._encode(inputs) if state is None else state.encoded
            arguments["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
            arguments["attention_mask"] = inputs.encoder_mask
            arguments["decoder_attention_mask"] = inputs.mask
        else:
            arguments["attention_mask"] = inputs.mask
            if self._takes_positions:
                arguments["position_ids"] = inputs.positions
        if self._keeps_logits and not inputs.all_logits:
            arguments["logits_to_keep"] = 1
        if self._positions is not None:
            self._positions.positions = None if inputs.mask is None else inputs.positions
        if state is not None:
            arguments[state.name] = state.cache
        prepared = self._model.prepare_inputs_for_generation(
            inputs.token_ids, is_first_iteration=state is None, **arguments
        )
        if inputs.patches:
            self._embed(inputs, prepared)
        output = self._model(**prepared, return_dict=True)
        return output.logits, _state(output, encoded)

    def merge(
        self, parts: Sequence[tuple[HfState, list[int]]], width: int, encoder_width: int
    ) -> HfState:
        """See `Network.merge`."""
        return hf_state.merge(parts, width, encoder_width)

    def _embed(self, inputs: Inputs, prepared: dict[str, Any]) -> None:
        """Give the model embeddings instead of ids."""
        assert self.embeddings.decoder is not None
        ids, embeds = "input_ids", "inputs_embeds"
        if self._is_seq2seq:
            ids, embeds = f"decoder_{ids}", f"decoder_{embeds}"
        prepared[ids] = None
        prepared[embeds] = patched(self.embeddings.decoder, inputs.token_ids, inputs.patches)

    def _encode(self, inputs: Inputs) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": inputs.encoder_ids}
        if inputs.encoder_patches:
            assert self.embeddings.encoder is not None
            assert inputs.encoder_ids is not None
            ids, patches = inputs.encoder_ids, inputs.encoder_patches
            arguments = {"inputs_embeds": patched(self.embeddings.encoder, ids, patches)}
        output = self._model.get_encoder()(
            **arguments, attention_mask=inputs.encoder_mask, return_dict=True
        )
        encoded: Tensor = output.last_hidden_state
        return encoded


def _state(output: Any, encoded: Tensor | None) -> HfState:
    for name in _CACHE_NAMES:
        if (cache := output.get(name)) is not None:
            return HfState(name, cache, encoded)
    raise ModelError("it keeps no cache of what it has computed; it cannot be served")


@torch.inference_mode()
def _caps(
    network: HfNetwork, model: Any, files: ModelFiles, dtype: torch.dtype, start_id: int | None
) -> EngineCaps:
    """Sizes as a pass over one token shows them."""
    one = torch.ones(1, 1, dtype=torch.int64)
    inputs = Inputs(one, one - 1, None, None, None, all_logits=False)
    if start_id is not None:
        inputs = inputs._replace(encoder_ids=one, encoder_mask=one)
    logits, state = network.forward(inputs, None)
    per_token, fixed = state.row_bytes()
    return EngineCaps(
        name=NAME,
        kind=files.kind,
        kv_layout="padded",
        chunked_prefill=False,
        vocab_size=logits.shape[-1],
        max_positions=_max_positions(model),
        kv_bytes_per_token=max(1, per_token + fixed // _SPREAD_TOKENS),
        dtype=str(dtype).removeprefix("torch."),
    )


def _max_positions(model: Any) -> int | None:
    """Positions of a model that has a table of them; None for one that computes them."""
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables += [name for name, _ in model.named_buffers() if name.endswith(".embed_positions")]
    if not any("position" in name or name.endswith(".wpe") for name in tables):
        return None
    config = model.config.get_text_config(decoder=True)
    sizes = (getattr(config, key, None) for key in _POSITION_KEYS)
    return next((size for size in sizes if size), None)
