"""What engines share whose batches are padded.

Sequences of one forward pass share a cache as wide as the longest of them; the others are padded on
the left (decoder) or on the right (encoder). A batch is never rearranged row by row: when the rows
of a step are not exactly those of one batch, a new batch is merged from the old ones. So joining,
leaving, running only some of the rows, and cutting off padding are one operation.

A step changes nothing before all of it has been computed: a step that fails can be tried again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from tgis.adapters.load import Adapter
from tgis.adapters.prompts import SoftPrompt
from tgis.engines.allocations import failed_allocations
from tgis.engines.base import CacheShape, EngineCaps
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ConfigError

Batching = Literal["padded", "aligned", "single"]
"""Which sequences may share a forward pass: any, those of equal length, or none."""

_GONE = -1  # slot of a row of a batch that has left


class State(Protocol):
    """The cache of a batch: whatever a network needs to go on, for each row."""

    def save(self) -> Callable[[], None]:
        """Return a function that puts back what is there now."""


S = TypeVar("S", bound=State)


class Patch(NamedTuple):
    """Embeddings [columns, hidden] instead of those of the ids in some columns of one row."""

    row: int
    column: int
    embeddings: Tensor


class Inputs(NamedTuple):
    """One forward pass: n rows of q new tokens, after w columns of cache."""

    token_ids: Tensor  # int64 [n, q], padded on the left
    positions: Tensor  # int64 [n, q]
    mask: Tensor | None  # int64 [n, w + q], 1 = token; None = no padding
    encoder_ids: Tensor | None  # int64 [n, e], padded on the right; first pass only
    encoder_mask: Tensor | None  # int64 [n, e]; None = no encoder
    all_logits: bool  # else those after the last column are enough
    patches: tuple[Patch, ...] = ()  # of `token_ids`; soft prompts, in the first pass only
    encoder_patches: tuple[Patch, ...] = ()  # of `encoder_ids`


class Network(Protocol[S]):
    """A model that computes padded batches."""

    def forward(self, inputs: Inputs, state: S | None) -> tuple[Tensor, S]:
        """Compute one pass.

        Args:
            state: None in the first pass of these rows. May be changed in place.

        Returns:
            Logits of any float type, [n, q or 1, vocabulary], and the state after the pass.
        """

    def merge(self, parts: Sequence[tuple[S, list[int]]], width: int, encoder_width: int) -> S:
        """Make one state of some rows of several; the old ones stay as they are.

        Args:
            parts: states and the rows wanted of each.
            width: columns of the new state; cut off or added on the left.
            encoder_width: the same for the encoder's tokens, on the right.
        """


@dataclass(slots=True, eq=False)
class Batch(Generic[S]):
    """Rows that share a state."""

    slots: list[int]
    lengths: list[int]  # tokens of each row
    encoder_lengths: list[int]  # 0 without encoder
    width: int  # columns
    state: S


class PaddedEngine(Generic[S]):
    """An engine over a network that computes padded batches. See `tgis.engines.base.Engine`.

    Args:
        batching: which sequences may share a forward pass.
        pad_id: token id that fills up rows.
    """

    def __init__(
        self, network: Network[S], caps: EngineCaps, batching: Batching, pad_id: int
    ) -> None:
        self.caps = caps
        self._network = network
        self._batching = batching
        self._pad_id = pad_id
        self._batches: dict[int, Batch[S]] = {}  # by slot
        self._prompts: dict[int, SoftPrompt] = {}  # by handle

    def allocate(self, shape: CacheShape) -> None:
        """See `Engine.allocate`; the cache grows with its contents.

        Raises:
            ConfigError: slots of more tokens than the model has positions.
        """
        limit = self.caps.max_positions
        if limit is not None and shape.slot_tokens > limit:
            raise ConfigError(
                f"sequences of {shape.slot_tokens} tokens are longer than the model's"
                f" {limit} positions"
            )

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """See `Engine.forward`.

        Raises:
            ValueError: a row does not continue what its slot holds.
        """
        with failed_allocations():
            return self._forward(plan)

    def attach(self, handle: int, adapter: Adapter) -> None:
        """See `Engine.attach`."""
        assert isinstance(adapter, SoftPrompt), "caps say that there is nothing else"
        self._prompts[handle] = adapter

    def detach(self, handle: int) -> None:
        """See `Engine.detach`."""
        self._prompts.pop(handle, None)

    def release(self, slots: Sequence[int]) -> None:
        """See `Engine.release`; memory goes when the batch is merged anew, or empty."""
        for slot in slots:
            if (batch := self._batches.pop(slot, None)) is not None:
                batch.slots[batch.slots.index(slot)] = _GONE

    def close(self) -> None:
        """See `Engine.close`."""
        self._batches.clear()

    def _forward(self, plan: StepPlan) -> Tensor:
        logits = torch.empty(plan.num_logits, self.caps.vocab_size)
        places = _places(plan, logits)
        new: list[Batch[S]] = []
        continued: list[tuple[Batch[S], S]] = []
        undo: list[Callable[[], None]] = []
        try:
            for rows in self._parts(row for row in plan.rows if row.start == 0):
                new.append(self._prefill(rows, places))
            for rows in self._parts(row for row in plan.rows if row.start > 0):
                batch = self._gather(rows)
                undo.append(batch.state.save())
                continued.append((batch, self._decode(batch, rows, places)))
        except BaseException:
            for restore in undo:
                restore()
            raise
        for batch, state in continued:
            batch.lengths = [length + 1 for length in batch.lengths]
            batch.width += 1
            batch.state = state
        for batch in new:
            self.release(batch.slots)
            self._batches |= dict.fromkeys(batch.slots, batch)
        return logits

    def _parts(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Rows that are computed in the same pass."""
        parts: dict[object, list[Row]] = {}
        for row in rows:
            length = row.start + len(row.token_ids)
            keys = {"padded": None, "aligned": length, "single": row.slot}
            wants_all = row.want is Want.ALL and row.start == 0
            parts.setdefault((wants_all, keys[self._batching]), []).append(row)
        yield from parts.values()

    def _prefill(self, rows: list[Row], places: dict[int, Tensor]) -> Batch[S]:
        lengths = [len(row.token_ids) for row in rows]
        encoder_ids = [row.encoder_ids or [] for row in rows]
        encoder_lengths = [len(ids) for ids in encoder_ids]
        width = max(lengths)
        has_encoder = any(encoder_lengths)
        inputs = Inputs(
            token_ids=self._pad([row.token_ids for row in rows], left=True),
            positions=(torch.arange(width) - width + torch.tensor(lengths)[:, None]).clamp(min=0),
            mask=left_mask(lengths, width),
            encoder_ids=self._pad(encoder_ids, left=False) if has_encoder else None,
            encoder_mask=right_mask(encoder_lengths),
            all_logits=rows[0].want is Want.ALL,
            **self._patches(rows, [width - length for length in lengths]),
        )
        out, state = self._network.forward(inputs, None)
        for row, values in zip(rows, out, strict=True):
            _put(places[row.slot], values)
        return Batch([row.slot for row in rows], lengths, encoder_lengths, width, state)

    def _patches(self, rows: list[Row], columns: list[int]) -> dict[str, tuple[Patch, ...]]:
        """The soft prompts of rows that begin at these columns; encoders' begin at column 0."""
        patches, encoder_patches = [], []
        for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
            if row.prompt:
                prompt = self._prompts[row.prompt]
                if prompt.decoder is not None:
                    patches.append(Patch(number, column, prompt.decoder))
                if prompt.encoder is not None:
                    encoder_patches.append(Patch(number, 0, prompt.encoder))
        return {"patches": tuple(patches), "encoder_patches": tuple(encoder_patches)}

    def _decode(self, batch: Batch[S], rows: list[Row], places: dict[int, Tensor]) -> S:
        by_slot = {row.slot: row for row in rows}
        ordered = [by_slot[slot] for slot in batch.slots]
        lengths = [length + 1 for length in batch.lengths]
        inputs = Inputs(
            token_ids=torch.tensor([row.token_ids for row in ordered]),
            positions=torch.tensor(batch.lengths)[:, None],
            mask=left_mask(lengths, batch.width + 1),
            encoder_ids=None,
            encoder_mask=right_mask(batch.encoder_lengths),
            all_logits=False,
        )
        out, state = self._network.forward(inputs, batch.state)
        for row, values in zip(ordered, out, strict=True):
            _put(places[row.slot], values)
        return state

    def _gather(self, rows: list[Row]) -> Batch[S]:
        """The batch of exactly these rows."""
        for row in rows:
            self._check(row)
        sources = {id(batch): batch for batch in (self._batches[row.slot] for row in rows)}
        slots = {row.slot for row in rows}
        first = next(iter(sources.values()))
        if len(sources) == 1 and slots == set(first.slots):
            return first
        picks = [
            (batch, [i for i, slot in enumerate(batch.slots) if slot in slots])
            for batch in sources.values()
        ]
        merged = _merge(self._network, picks)
        self.release(merged.slots)
        self._batches |= dict.fromkeys(merged.slots, merged)
        return merged

    def _check(self, row: Row) -> None:
        batch = self._batches.get(row.slot)
        held = 0 if batch is None else batch.lengths[batch.slots.index(row.slot)]
        if held != row.start or len(row.token_ids) != 1:
            raise ValueError(
                f"slot {row.slot} holds {held} tokens;"
                f" it cannot go on with {len(row.token_ids)} from {row.start} on"
            )

    def _pad(self, rows: list[list[int]], left: bool) -> Tensor:
        width = max(map(len, rows))
        padding = ([self._pad_id] * (width - len(ids)) for ids in rows)
        return torch.tensor(
            [[*pad, *ids] if left else [*ids, *pad] for pad, ids in zip(padding, rows, strict=True)]
        )


def _places(plan: StepPlan, logits: Tensor) -> dict[int, Tensor]:
    """The part of `logits` that is each slot's."""
    places, offset = {}, 0
    for row in plan.rows:
        places[row.slot] = logits[offset : offset + row.num_logits]
        offset += row.num_logits
    return places


def _put(place: Tensor, values: Tensor) -> None:
    """Fill `place` [wanted, vocabulary] with the last of `values` [columns, vocabulary]."""
    place.copy_(values[len(values) - len(place) :])


def _merge(network: Network[S], picks: Sequence[tuple[Batch[S], list[int]]]) -> Batch[S]:
    """A batch of some rows of several."""
    slots = [batch.slots[i] for batch, rows in picks for i in rows]
    lengths = [batch.lengths[i] for batch, rows in picks for i in rows]
    encoder_lengths = [batch.encoder_lengths[i] for batch, rows in picks for i in rows]
    width = max(lengths)
    parts = [(batch.state, rows) for batch, rows in picks]
    state = network.merge(parts, width, max(encoder_lengths))
    return Batch(slots, lengths, encoder_lengths, width, state)


def left_mask(lengths: Sequence[int], width: int) -> Tensor | None:
    """int64 [n, width], 1 in the last `lengths` columns; None if there is no padding."""
    if min(lengths) == width:
        return None
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def right_mask(lengths: Sequence[int]) -> Tensor | None:
    """int64 [n, longest], 1 in the first `lengths` columns; None without encoder."""
    if not any(lengths):
        return None
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def merge_rows(
    parts: Sequence[tuple[Tensor, list[int]]], width: int | None = None, *, left: bool = True
) -> Tensor:
    """Rows of several tensors [n, ..., columns, size] in one.

    Args:
        parts: tensors and the rows wanted of each.
        width: columns of the result: cut off or filled up with zeros on the left, or on the right.
            None = as they are (and there need be no such dimension).
    """
    picked = [
        tensor if rows == list(range(len(tensor))) else tensor[rows] for tensor, rows in parts
    ]
    if width is None:
        return torch.cat(picked)
    shape = [sum(map(len, picked)), *picked[0].shape[1:]]
    shape[-2] = width
    merged, start = picked[0].new_zeros(shape), 0
    for tensor in picked:
        columns = tensor.shape[-2]
        kept = min(columns, width)
        target = merged[start : start + len(tensor)]
        target.narrow(-2, width - kept if left else 0, kept).copy_(
            tensor.narrow(-2, columns - kept if left else 0, kept)
        )
        start += len(tensor)
    return merged
