"""Which sequences may share a pass of a network, found out by a few tiny passes.

A batch must give each row what the row gets alone. Where padding disturbs that (positions that
cannot be set, pads that are not masked), only rows of equal length may share a pass; where caches
cannot be merged, none.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from tgis.engines.base import EngineCaps
from tgis.engines.padded import Batching, Network, PaddedEngine, S
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ModelError

log = logging.getLogger(__name__)

# Differences that rounding explains, as a share of the largest logit. A wrong position or an
# unmasked pad costs a trained model a multiple of that.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_LENGTHS = (3, 11, 11)  # tokens
_SHARED: tuple[Batching, ...] = ("padded", "aligned")


def choose_batching(
    network: Network[S], caps: EngineCaps, pad_id: int, start_id: int | None
) -> Batching:
    """The way to batch that costs least and is right.

    Args:
        pad_id: fills up rows, and is no token of the trial.
        start_id: first token of a decoder behind an encoder; None = decoder-only.

    Raises:
        ModelError: the network does not go on from its own cache as it should.
    """
    prompts = _prompts(caps, pad_id, start_id)
    alone = _steps(PaddedEngine(network, caps, "single", pad_id), prompts)
    whole = [_row(row, [*row.token_ids, prompts[0].token_ids[-1]]) for row in prompts]
    at_once = PaddedEngine(network, caps, "single", pad_id).forward(StepPlan(whole))
    if not _agree(alone[1], at_once, caps.dtype):
        raise ModelError(
            "the model gives other scores when it goes on from its cache than when it computes a"
            " whole sequence at once; it cannot be served token by token"
        )
    for batching in _SHARED:
        try:
            shared = _steps(PaddedEngine(network, caps, batching, pad_id), prompts)
        except Exception as error:  # whatever a model makes of a batch
            log.debug("batching %r is not possible: %r", batching, error)
            continue
        if all(_agree(a, b, caps.dtype) for a, b in zip(shared, alone, strict=True)):
            return batching
    return "single"


def trial(
    network: Network[S], caps: EngineCaps, batching: Batching, pad_id: int, start_id: int | None
) -> list[Tensor]:
    """The logits of a few steps in which sequences of several lengths start, go on, and leave.

    Args: as in `choose_batching`.
    """
    engine = PaddedEngine(network, caps, batching, pad_id)
    return _steps(engine, _prompts(caps, pad_id, start_id))


def _prompts(caps: EngineCaps, pad_id: int, start_id: int | None) -> list[Row]:
    return [_prompt(slot, length, caps, pad_id, start_id) for slot, length in enumerate(_LENGTHS)]


def _prompt(slot: int, length: int, caps: EngineCaps, pad_id: int, start_id: int | None) -> Row:
    def tokens(count: int) -> list[int]:
        ids = (37 * (number + 5 * slot) % caps.vocab_size for number in range(1, count + 3))
        return [token for token in ids if token != pad_id][:count]

    if start_id is None:
        return Row(slot, slot, tokens(length), 0, Want.LAST)
    decoder_ids = [start_id, *tokens(length)[1:]]
    return Row(slot, slot, decoder_ids, 0, Want.LAST, encoder_ids=tokens(length + 2))


def _row(row: Row, token_ids: list[int], start: int = 0) -> Row:
    return Row(row.seq_id, row.slot, token_ids, start, Want.LAST, encoder_ids=row.encoder_ids)


def _steps(engine: PaddedEngine[S], prompts: Sequence[Row]) -> list[Tensor]:
    """Logits of a step over these prompts, of the step after it, and of one without the second."""
    token = prompts[0].token_ids[-1]
    follow = [_row(row, [token], len(row.token_ids)) for row in prompts]
    further = [_row(row, [token], row.start + 1) for row in follow]
    plans = [list(prompts), follow, [further[0], further[2]]]
    return [engine.forward(StepPlan(rows)) for rows in plans]


def _agree(a: Tensor, b: Tensor, dtype: str) -> bool:
    scale = float(b.abs().max())
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= TOLERANCE[dtype] * scale
