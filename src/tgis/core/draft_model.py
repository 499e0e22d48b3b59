"""Drafts from a second, small model with the same vocabulary.

It computes greedily what it takes to be the next tokens, in a cache of its own, and is kept in step
with what the sequences turn out to be: a token that it has guessed right is computed already. Soft
prompts and LoRA adapters are unknown to it; for such sequences it is only less often right.
"""

import logging
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from itertools import takewhile

from tgis.core.sequence import Sequence
from tgis.engines.base import CacheShape, Engine
from tgis.engines.plan import Row, StepPlan, Want

log = logging.getLogger(__name__)

# Of what it has not read yet, prompts above all, so many tokens a step at most.
CATCH_UP_TOKENS = 256


@dataclass(slots=True)
class _Reader:
    """A sequence as far as the model has computed it."""

    slot: int
    num_known: int = 0  # tokens of the sequence that are computed, ...
    guessed: list[int] = field(default_factory=list)  # ... and what it has computed behind them

    def follow(self, ids: Ids[int]) -> int:
        """Keep the guesses that have become true; returns how many tokens are computed."""
        pairs = zip(self.guessed, ids[self.num_known :], strict=False)
        self.num_known += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.guessed = []
        self.num_known = min(self.num_known, len(ids) - 1)  # the last one says what follows
        return self.num_known


class DraftModel:
    """See `Drafter`.

    Args:
        engine: the small model, its cache allocated.
        shape: of that cache: sequences that it can read at a time, and how far.
        vocab_size: of the model that it drafts for.
        step_seconds: what a step of one token takes.
    """

    def __init__(
        self,
        engine: Engine,
        shape: CacheShape,
        vocab_size: int,
        step_seconds: float,
    ) -> None:
        self._engine = engine
        self._length = shape.slot_tokens
        self._vocab_size = min(vocab_size, engine.caps.vocab_size)
        self._step_seconds = step_seconds
        self._free = list(range(shape.num_slots))
        self._readers: dict[int, _Reader] = {}  # by uid, the one used last at the end
        self._is_broken = False

    def draft(self, wanted: Ids[tuple[Sequence, int]]) -> list[list[int]]:
        """See `Drafter.draft`; a model that fails is not asked again."""
        if self._is_broken:
            return [[] for _ in wanted]
        try:
            return self._draft(wanted)
        except Exception:
            log.exception("the draft model has failed; there are no drafts from now on")
            self._is_broken = True
            return [[] for _ in wanted]

    def seconds(self, num_tokens: int) -> float:
        """See `Drafter.seconds`."""
        return num_tokens * self._step_seconds

    def forget(self, uid: int) -> None:
        """See `Drafter.forget`."""
        reader = self._readers.pop(uid, None)
        if reader is not None:
            self._free.append(reader.slot)
            self._engine.release([reader.slot])

    def _draft(self, wanted: Ids[tuple[Sequence, int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wanted]
        needed = {seq.uid for seq, _ in wanted}
        readers = [self._reader(seq.uid, needed) for seq, _ in wanted]
        texts = [
            seq.real_ids if len(seq.token_ids) + n <= self._length else [] for seq, n in wanted
        ]
        rows, ready = self._catch_up(texts, readers)
        while rows:
            logits = self._engine.forward(StepPlan(rows))
            tokens = logits[:, : self._vocab_size].argmax(dim=1).tolist() if ready else []
            for i, token in zip(ready, tokens, strict=True):
                drafts[i].append(token)
            ready = [i for i in ready if len(drafts[i]) < wanted[i][1]]
            rows = [_next(readers[i], drafts[i][-1]) for i in ready]
        return drafts

    def _catch_up(
        self, texts: list[list[int]], readers: list[_Reader]
    ) -> tuple[list[Row], list[int]]:
        """Rows of what has not been read, and whose last token is among them."""
        rows, ready = [], []
        budget = CATCH_UP_TOKENS
        for i, (ids, reader) in enumerate(zip(texts, readers, strict=True)):
            start = reader.follow(ids) if ids else 0
            new = ids[start : start + budget]
            if not new or max(new) >= self._engine.caps.vocab_size:
                continue
            is_whole = start + len(new) == len(ids)
            want = Want.LAST if is_whole else Want.NOTHING
            rows.append(Row(i, reader.slot, new, start, want))
            reader.num_known += len(new)
            budget -= len(new)
            if is_whole:
                ready.append(i)
        return rows, ready

    def _reader(self, uid: int, needed: set[int]) -> _Reader:
        """The place of a sequence; one that nobody needs now gives up its own."""
        reader = self._readers.pop(uid, None)
        if reader is None:
            if not self._free:
                self.forget(next(other for other in self._readers if other not in needed))
            reader = _Reader(self._free.pop())
        self._readers[uid] = reader
        return reader


def _next(reader: _Reader, token_id: int) -> Row:
    """A row that goes on with a guess."""
    start = reader.num_known + len(reader.guessed)
    reader.guessed.append(token_id)
    return Row(reader.slot, reader.slot, [token_id], start, Want.LAST)
