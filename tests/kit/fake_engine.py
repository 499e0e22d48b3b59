"""An engine whose next token is known in advance, and that can fail when told to.

What it keeps of a token depends on all tokens before it, as real keys and values do. So a row that
reads from the wrong slot, from a block of another sequence or from a copy that was never made
generates the wrong tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from tgis.adapters.load import Adapter
from tgis.adapters.prompts import SoftPrompt
from tgis.engines.base import CacheShape, EngineCaps
from tgis.engines.plan import KvCopy, Row, StepPlan, Want
from tgis.types import ModelKind

VOCAB = 32
_PRIME = 1_000_003


def _advance(state: int, token_id: int) -> int:
    return (state * 131 + token_id + 7) % _PRIME


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake engine generates greedily."""
    state = 0
    for token_id in prompt:
        state = _advance(state, token_id)
    tokens: list[int] = []
    for _ in range(num_tokens):
        tokens.append(state % VOCAB)
        state = _advance(state, tokens[-1])
    return tokens


class FakeCache:
    """A state for each token, in rows or in blocks; reading what was not written is an error.

    Args:
        block_tokens: of the `blocks` layout; 0 = rows.
    """

    def __init__(self, shape: CacheShape, block_tokens: int = 0) -> None:
        self._block_tokens = block_tokens
        self.slots: list[list[int]] = [[] for _ in range(shape.num_slots)]

    def compute(self, plan: StepPlan) -> list[list[int]]:
        """Write what the plan says; the tokens that follow each of its tokens, by row."""
        for copy in plan.copies:
            self._copy(copy)
        return [self._row(row) for row in plan.rows]

    def release(self, slots: Sequence[int]) -> None:
        """Lose what is in these slots."""
        for slot in slots:
            self.slots[slot].clear()

    def _copy(self, copy: KvCopy) -> None:
        copied = self.slots[copy.source][: copy.num_tokens]
        assert len(copied) == copy.num_tokens, "a copy of what is not there"
        self.slots[copy.target] = copied

    def _row(self, row: Row) -> list[int]:
        state = self._read(row, row.start - 1) if row.start else 0
        follow = []
        for position, token_id in enumerate(row.token_ids, row.start):
            state = _advance(state, token_id)
            self._write(row, position, state)
            follow.append(state % VOCAB)
        return follow

    def _place(self, row: Row, position: int) -> tuple[list[int], int]:
        if not self._block_tokens:
            return self.slots[row.slot], position
        block = row.block_table[position // self._block_tokens]
        return self.slots[block], position % self._block_tokens

    def _read(self, row: Row, position: int) -> int:
        states, place = self._place(row, position)
        return states[place]

    def _write(self, row: Row, position: int, state: int) -> None:
        states, place = self._place(row, position)
        del states[place:]
        assert len(states) == place, "a row starts beyond what is cached"
        states.append(state)


class FakeEngine:
    """See above; `before_forward` may raise or stall."""

    def __init__(
        self,
        before_forward: Callable[[StepPlan], None] | None = None,
        kv_layout: Literal["rows", "blocks", "padded"] = "rows",
        block_tokens: int = 0,
    ) -> None:
        self.caps = EngineCaps(
            name="fake",
            kind=ModelKind.DECODER_ONLY,
            kv_layout=kv_layout,
            chunked_prefill=kv_layout != "padded",
            vocab_size=VOCAB,
            max_positions=None,
            kv_bytes_per_token=1,
            dtype="float32",
            kv_granule=block_tokens or 1,
            soft_prompt_size=1,
            verifies_drafts=kv_layout != "padded",
        )
        self.attached: dict[int, SoftPrompt] = {}
        self.before_forward = before_forward
        self.plans: list[StepPlan] = []
        self.shape: CacheShape | None = None
        self._block_tokens = block_tokens

    def allocate(self, shape: CacheShape) -> None:
        self.shape = shape
        self.cache = FakeCache(shape, self._block_tokens)

    def forward(self, plan: StepPlan) -> torch.Tensor:
        if self.before_forward is not None:
            self.before_forward(plan)
        self.plans.append(plan)
        chosen: list[int] = []
        spliced = replace(plan, rows=[self._spliced(row) for row in plan.rows])
        for row, follow in zip(plan.rows, self.cache.compute(spliced), strict=True):
            if row.want is Want.ALL:
                chosen += follow
            elif row.want is Want.LAST:
                chosen.append(follow[-1])
        logits = torch.zeros(len(chosen), VOCAB)
        if chosen:
            logits[torch.arange(len(chosen)), torch.tensor(chosen)] = 5.0
        return logits

    def _spliced(self, row: Row) -> Row:
        """A soft prompt's embeddings are numbers that stand for token ids."""
        if not row.prompt:
            return row
        prompt = self.attached[row.prompt].decoder
        assert prompt is not None
        values = [int(value) for value in prompt[row.start :, 0]][: len(row.token_ids)]
        return replace(row, token_ids=values + row.token_ids[len(values) :])

    def attach(self, handle: int, adapter: Adapter) -> None:
        assert handle not in self.attached
        assert isinstance(adapter, SoftPrompt)
        self.attached[handle] = adapter

    def detach(self, handle: int) -> None:
        del self.attached[handle]

    def release(self, slots: Sequence[int]) -> None:
        self.cache.release(slots)

    def close(self) -> None:
        del self.cache
