"""An engine whose next token is known in advance, and that can fail when told to."""

from collections.abc import Callable, Sequence

import torch

from tgis.engines.base import CacheShape, EngineCaps
from tgis.engines.plan import StepPlan, Want
from tgis.types import ModelKind

VOCAB = 32


def next_token(token_id: int, position: int) -> int:
    """The token that follows: depends on token and position, so misplaced rows show."""
    return (3 * token_id + position + 1) % VOCAB


class FakeEngine:
    """Keeps what was written to each slot and checks that every read is of written tokens.

    `before_forward` may raise or stall.
    """

    def __init__(self, before_forward: Callable[[StepPlan], None] | None = None) -> None:
        self.caps = EngineCaps(
            name="fake",
            kind=ModelKind.DECODER_ONLY,
            kv_layout="rows",
            chunked_prefill=True,
            vocab_size=VOCAB,
            max_positions=None,
            kv_bytes_per_token=1,
            dtype="float32",
        )
        self.before_forward = before_forward
        self.plans: list[StepPlan] = []
        self.slots: dict[int, list[int]] = {}

    def allocate(self, shape: CacheShape) -> None:
        self.slots = {slot: [] for slot in range(shape.num_slots)}

    def forward(self, plan: StepPlan) -> torch.Tensor:
        if self.before_forward is not None:
            self.before_forward(plan)
        self.plans.append(plan)
        for copy in plan.copies:
            self.slots[copy.target] = self.slots[copy.source][: copy.num_tokens]
            assert len(self.slots[copy.target]) == copy.num_tokens
        chosen: list[int] = []
        for row in plan.rows:
            cached = self.slots[row.slot]
            assert len(cached) >= row.start, "a row starts beyond what is cached"
            del cached[row.start :]
            cached += row.token_ids
            follow = [next_token(t, row.start + i) for i, t in enumerate(row.token_ids)]
            if row.want is Want.ALL:
                chosen += follow
            elif row.want is Want.LAST:
                chosen.append(follow[-1])
        logits = torch.zeros(len(chosen), VOCAB)
        if chosen:
            logits[torch.arange(len(chosen)), torch.tensor(chosen)] = 5.0
        return logits

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.slots[slot] = []

    def close(self) -> None:
        self.slots = {}


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake engine generates greedily."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids[-1], len(ids) - 1))
    return ids[len(prompt) :]
