"""What all layers of a step share, prepared once: which tokens, where they lie, what is wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class BlockTables:
    """Where the keys and values of a step's S sequences and T new tokens lie in a pool of blocks.

    Attributes:
        tables: int32 [S, most blocks of one]: the sequence's blocks, filled up with 0.
        places: int32 [T]: where a token's key and value go, counted in tokens of the pool.
        zeros: int32 [T].
        num_new: of each sequence its new tokens, on the host.
        num_keys: of each sequence all its tokens, those included, on the host.
        prepared: what a back end makes of this once for all layers.
    """

    tables: Tensor
    places: Tensor
    zeros: Tensor
    num_new: Sequence[int]
    num_keys: Sequence[int]
    prepared: dict[object, Any] = field(default_factory=dict)


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
    blocks: BlockTables | None = None  # of the `blocks` layout

    @property
    def is_repeatable(self) -> bool:
        """Whether steps like this will come again: one new token for each sequence, or few tokens
        that are drafts for most; logits are wanted after each.
        """
        num_tokens = len(self.token_ids)
        few = num_tokens <= max(len(self.slots), FEW_TOKENS)
        return few and num_tokens == len(self.logits_index)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in order, but for those of the `blocks` layout."""
        return tuple(getattr(self, field) for field in _FIELDS)


_FIELDS = tuple(field.name for field in fields(StepInputs) if field.name != "blocks")


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

    Args:
        block_tokens: tokens of a block in the `blocks` layout; 0 = the `rows` layout.
        device: where the tensors of the step are wanted.

    Attributes:
        splices: the tokens that are those of soft prompts.
    """

    def __init__(self, block_tokens: int = 0, device: torch.device = CPU) -> None:
        self._block_tokens = block_tokens
        self._device = device
        self._tables: list[Sequence[int]] = []
        self._places: list[int] = []
        self._num_new: list[int] = []
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
        block_table: Sequence[int] = (),
    ) -> None:
        """Tokens of one sequence at positions `start`, ...; logits after the last `num_logits`.

        Args:
            prompt: [n, hidden], the embeddings of the sequence's first n positions, if they are
                those of a soft prompt.
            lora: the address of the sequence's LoRA adapter; 0: it has none.
            block_table: the sequence's blocks.

        Raises:
            IndexError: a token lies beyond the sequence's blocks.
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
        if self._block_tokens:
            self._num_new.append(num_tokens)
            self._locate(block_table, start, start + num_tokens)

    def _locate(self, table: Sequence[int], start: int, stop: int) -> None:
        size = self._block_tokens
        self._places += [table[at // size] * size + at % size for at in range(start, stop)]
        self._tables.append(table[: -(-stop // size)])

    def inputs(self, rotary: tuple[Tensor, Tensor] | None) -> StepInputs:
        """The tensors of the step.

        Args:
            rotary: cosine and sine of all positions, as `rotary.rotary_table` makes them.
        """
        lists = {
            "token_ids": self._token_ids,
            "positions": self._positions,
            "token_slot": self._token_slot,
            "slots": self._slots,
            "q_start": self._q_start,
            "kv_len": self._kv_len,
            "logits_index": self._logits_index,
        }
        if any(self._lora):
            lists["lora"] = self._lora
        if self._block_tokens:
            lists |= {"places": self._places, "tables": self._padded_tables()}
        tensors = _tensors(lists, self._device)
        blocks = None
        if self._block_tokens:
            tables = tensors.pop("tables").view(len(self._slots), -1)
            places = tensors.pop("places")
            zeros = torch.zeros_like(places)
            blocks = BlockTables(tables, places, zeros, self._num_new, self._kv_len)
        positions = tensors["positions"]
        cos, sin = (t.index_select(0, positions) for t in rotary) if rotary else (None, None)
        return StepInputs(**tensors, cos=cos, sin=sin, blocks=blocks)

    def _padded_tables(self) -> list[int]:
        longest = max(map(len, self._tables))
        padded = ((*table, *[0] * (longest - len(table))) for table in self._tables)
        return list(chain.from_iterable(padded))


_WIDE = ("logits_index", "lora")  # int64; all others are int32


def _tensors(lists: Mapping[str, list[int]], device: torch.device) -> dict[str, Tensor]:
    """Tensors of these lists: on a card by one copy, which nobody waits for."""
    if device.type == "cpu":
        return {
            name: torch.tensor(values, dtype=torch.int64 if name in _WIDE else torch.int32)
            for name, values in lists.items()
        }
    flat = list(chain.from_iterable(lists.values()))
    host = torch.tensor(flat, dtype=torch.int64, pin_memory=device.type == "cuda")
    sizes = [len(values) for values in lists.values()]
    parts = torch.split(host.to(device, non_blocking=True), sizes)
    pairs = zip(lists, parts, strict=True)
    return {name: part if name in _WIDE else part.int() for name, part in pairs}
