"""What all layers of a step share, prepared once: which tokens, where they lie, what is wanted."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


FEW_TOKENS = 32  # of a step that is recorded although sequences have several each


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """A flat batch of the T new tokens of S sequences; N rows of logits are wanted."""

    token_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    token_slot: Tensor  # int32 [T]: slot of the token's sequence
    slots: Tensor  # int32 [S]
    q_start: Tensor  # int32 [S + 1]: sequence s owns tokens q_start[s] .. q_start[s + 1]
    kv_len: Tensor  # int32 [S]: tokens of the sequence, those of this step included
    logits_index: Tensor  # int64 [N]: the tokens after which logits are wanted
    cos: Tensor | None  # float32 [T, rotary dim / 2]
    sin: Tensor | None
    lora: Tensor | None = None  # int64 [T], as `lora.Adaptable` reads it; None: no adapters

    @property
    def is_repeatable(self) -> bool:
        """Whether steps like this will come again: one new token for each sequence, or few tokens
        that are drafts for most; logits are wanted after each.
        """
        num_tokens = len(self.token_ids)
        few = num_tokens <= max(len(self.slots), FEW_TOKENS)
        return few and num_tokens == len(self.logits_index)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in order."""
        return tuple(getattr(self, field) for field in _FIELDS)


_FIELDS = tuple(field.name for field in fields(StepInputs))


class Splice(NamedTuple):
    """Embeddings [n, hidden] of tokens `first`, ... of a step, instead of those of their ids."""

    first: int
    rows: Tensor


def splice(embeddings: Tensor, splices: Sequence[Splice]) -> None:
    """Put the embeddings of soft prompts in their places in [T, hidden]."""
    for first, rows in splices:
        embeddings[first : first + len(rows)] = rows


class NewTokens:
    """Collects a step's tokens, sequence by sequence.

    Attributes:
        splices: the tokens that are those of soft prompts.
    """

    def __init__(self) -> None:
        self.splices: list[Splice] = []
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._token_slot: list[int] = []
        self._lora: list[int] = []
        self._slots: list[int] = []
        self._q_start = [0]
        self._kv_len: list[int] = []
        self._logits_index: list[int] = []

    def add(
        self,
        slot: int,
        token_ids: Sequence[int],
        start: int,
        num_logits: int,
        prompt: Tensor | None = None,
        lora: int = 0,
    ) -> None:
        """Tokens of one sequence at positions `start`, ...; logits after the last `num_logits`.

        Args:
            prompt: [n, hidden], the embeddings of the sequence's first n positions, if they are
                those of a soft prompt.
            lora: the address of the sequence's LoRA adapter; 0: it has none.
        """
        num_tokens = len(token_ids)
        if prompt is not None and start < len(prompt):
            rows = prompt[start : start + num_tokens]
            self.splices.append(Splice(self._q_start[-1], rows))
        self._token_ids += token_ids
        self._positions += range(start, start + num_tokens)
        self._token_slot += [slot] * num_tokens
        self._lora += [lora] * num_tokens
        self._slots.append(slot)
        end = self._q_start[-1] + num_tokens
        self._q_start.append(end)
        self._kv_len.append(start + num_tokens)
        self._logits_index += range(end - num_logits, end)

    def inputs(self, rotary: tuple[Tensor, Tensor] | None) -> StepInputs:
        """The tensors of the step.

        Args:
            rotary: cosine and sine of all positions, as `rotary.rotary_table` makes them.
        """
        positions = _int32(self._positions)
        cos, sin = (t.index_select(0, positions) for t in rotary) if rotary else (None, None)
        return StepInputs(
            token_ids=_int32(self._token_ids),
            positions=positions,
            token_slot=_int32(self._token_slot),
            slots=_int32(self._slots),
            q_start=_int32(self._q_start),
            kv_len=_int32(self._kv_len),
            logits_index=torch.tensor(self._logits_index, dtype=torch.int64),
            cos=cos,
            sin=sin,
            lora=torch.tensor(self._lora, dtype=torch.int64) if any(self._lora) else None,
        )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
