"""The sampler: one step's logits in, one token per sequence out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tgis.sampling import device
from tgis.sampling.candidates import as_array, head, nucleus, pack
from tgis.sampling.logprobs import Scored, best_of, describe, norms_of, ranks_of
from tgis.sampling.native import library
from tgis.sampling.seeds import NoiseStream
from tgis.sampling.state import SequenceState
from tgis.sampling.warpers import penalise, softmax, softmax_row, warp, warp_row
from tgis.types import NO_DETAILS, DetailParams, SamplingParams, TokenDetails

Row = NDArray[np.float32]
Rows = Sequence[Row]
States = Sequence[SequenceState]

NOT_FINITE = "the model's scores for the next token are not finite"
_FEW = 8192  # up to this many candidates are worked on apart from the whole row


class Choice(NamedTuple):
    """The token chosen for one sequence, or why there is none.

    Attributes:
        token_id: -1 with an error.
        details: None where the sequence wants no details of generated tokens, or with an error.
        error: set where the row's logits have no finite maximum (NaN, infinity, nothing left to
            choose, or an overflow by its temperature). The sequence's state has not moved; its
            neighbours are not affected.
    """

    token_id: int
    details: TokenDetails | None = None
    error: str | None = None


_FAILED = Choice(-1, error=NOT_FINITE)


class Sampler:
    """Chooses the next token of every sequence of a batch, each by its own parameters.

    What a sequence gets depends on its own logits, parameters and history alone, bit for bit:
    neither on its neighbours nor on its place among them.

    Args:
        vocab_size: width of the logits.
        eos_token_ids: every id that ends a sequence.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        library()  # found or compiled now, not in the first step that samples
        self._vocab_size = vocab_size
        self._eos_ids = [i for i in eos_token_ids if 0 <= i < vocab_size]
        self._sequences: dict[int, SequenceState] = {}

    def add(
        self,
        seq_id: int,
        params: SamplingParams,
        details: DetailParams,
        prompt_ids: Sequence[int],
    ) -> None:
        """Register a sequence, once for its life; preemption does not matter here.

        Args:
            seq_id: a new one.
            params: how its tokens are chosen.
            details: what it wants to know of them.
            prompt_ids: the ids that the repetition penalty meets besides the generated ones: the
                real prompt (decoder-only), or the decoder's start token (encoder-decoder).

        Raises:
            ValueError: the id is registered already.
        """
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id} is registered already")
        details = details if details.output else NO_DETAILS
        self._sequences[seq_id] = SequenceState(params, details, prompt_ids, self._vocab_size)

    def remove(self, seq_id: int) -> None:
        """Forget a sequence; unknown ids are ignored."""
        self._sequences.pop(seq_id, None)

    def sample(self, seq_ids: Sequence[int], logits: Tensor) -> list[Choice]:
        """Choose one token for each sequence and advance its state by it.

        Args:
            seq_ids: n different registered sequences.
            logits: [n, vocab_size], the model's scores after each one's last token; overwritten.

        Returns:
            n choices in the order of `seq_ids`; see `Choice.error` for hostile logits.

        Raises:
            KeyError: a sequence is not registered.
            ValueError: the logits have another shape.
            MemoryError: as any other error that this step alone is to blame for, it leaves the
                states as they were, so that the same may be tried again.
        """
        rows = [self._sequences[i] for i in seq_ids]
        if logits.shape != (len(rows), self._vocab_size):
            expected = (len(rows), self._vocab_size)
            raise ValueError(f"logits are {tuple(logits.shape)}, not {expected}")
        if not rows:
            return []
        marks = [row.mark() for row in rows]
        try:
            if logits.device.type == "cpu":
                choices = self._on_host(rows, logits)
            else:
                choices = choose_on_device(rows, logits, self._eos_ids)
            for row, choice in zip(rows, choices, strict=True):
                if choice.error is None:
                    row.advance(choice.token_id)
        except Exception:
            for row, mark in zip(rows, marks, strict=True):
                row.rewind(mark)
            raise
        return choices

    def _on_host(self, rows: States, logits: Tensor) -> list[Choice]:
        with np.errstate(all="ignore"):
            scores = as_array(logits)
            penalise(scores, rows, self._eos_ids)
            return _choose(list(scores), rows)


def choose_on_device(states: States, logits: Tensor, eos_ids: Sequence[int]) -> list[Choice]:
    """As the host does, but for the noise; see `device`."""
    picked = device.pick(logits.float(), states, eos_ids)
    return [
        _FAILED if one is None else Choice(one[0], one[1] if state.details.output else None)
        for one, state in zip(
            device.fetch(picked, [state.details for state in states]), states, strict=True
        )
    ]


def _choose(rows: Rows, states: States) -> list[Choice]:
    """Choose for all rows, those together that need the same little work."""
    choices: dict[int, Choice] = {}
    greedy: list[int] = []
    few: dict[int, dict[int, _Selection]] = {}
    for i, (row, state) in enumerate(zip(rows, states, strict=True)):
        if state.noise is None:
            greedy.append(i)
        elif not np.isfinite(row.max() / np.float32(state.params.temperature)):
            choices[i] = _FAILED
        elif (selection := _select(row, state.params)) is None:
            choices[i] = _whole(row, state)
        else:
            width = max(len(selection.ids).bit_length(), 8)  # similar widths: little padding
            few.setdefault(width, {})[i] = selection
    best = _greedy([rows[i] for i in greedy], [states[i] for i in greedy])
    choices.update(zip(greedy, best, strict=True))
    for group in few.values():
        drawn = _few([rows[i] for i in group], [states[i] for i in group], [*group.values()])
        choices.update(zip(group, drawn, strict=True))
    return [choices[i] for i in range(len(states))]


def _greedy(rows: Rows, states: States) -> list[Choice]:
    """The highest score of each row, the lowest id of equals; a NaN counts as highest."""
    tokens = [int(row.argmax()) for row in rows]
    best = [row[token] for row, token in zip(rows, tokens, strict=True)]
    choices = [
        Choice(token) if np.isfinite(score) else _FAILED
        for token, score in zip(tokens, best, strict=True)
    ]
    detailed = [
        i for i, state in enumerate(states) if state.details.output and not choices[i].error
    ]
    if detailed:
        wanted = [states[i].details for i in detailed]
        rows = [rows[i] for i in detailed]
        scored = Scored(
            scores=np.array([best[i] for i in detailed]),
            norms=norms_of(rows, wanted),
            ranks=np.ones(len(rows), np.int64),
            best=best_of(rows, wanted),
        )
        for i, details in zip(detailed, describe(scored, wanted, _possible(scored)), strict=True):
            choices[i] = Choice(tokens[i], details)
    return choices


class _Selection(NamedTuple):
    """The ids, ascending, beyond which top-k or top-p drops everything; see `warp` for `rest`."""

    ids: NDArray[np.int64]
    rest: float = 0.0


def _select(row: Row, params: SamplingParams) -> _Selection | None:
    """The candidates of a sampling row, None where there may be too many."""
    if 0.0 < params.typical_p < 1.0:
        return None
    if params.top_k:
        return _Selection(head(row, params.top_k)) if params.top_k <= _FEW else None
    if params.top_p < 1.0:
        found = nucleus(row, params.temperature, params.top_p)
        return None if found is None else _Selection(*found)
    return None


def _few(rows: Rows, states: States, selections: Sequence[_Selection]) -> list[Choice]:
    """Sampling rows with few candidates: all rows at once."""
    candidates = pack(rows, [selection.ids for selection in selections])
    candidates.scores = warp(
        candidates.scores,
        [state.params for state in states],
        [selection.rest for selection in selections],
    )
    probs, norms = softmax(candidates.scores)
    noise = np.stack([s.at(ids) for s, ids in zip(_streams(states), candidates.ids, strict=True)])
    chosen = (np.arange(len(rows)), (probs / noise).argmax(axis=1))
    scores = candidates.scores[chosen]
    scored = Scored(
        scores=scores,
        norms=norms,
        ranks=1 + (candidates.scores > scores[:, None]).sum(axis=1),
        best=candidates,
    )
    return _choices(candidates.ids[chosen].tolist(), scored, states)


def _whole(row: Row, state: SequenceState) -> Choice:
    """A sampling row in which any token may win; one at a time, since a row fills the cache."""
    processed = warp_row(row, state.params)
    probs, norm = softmax_row(processed)
    token = _streams([state])[0].winner(probs)
    score = processed[token : token + 1]
    wanted = [state.details]
    scored = Scored(
        scores=score,
        norms=norm[None],
        ranks=ranks_of([processed], score, wanted),
        best=best_of([processed], wanted),
    )
    return _choices([token], scored, [state])[0]


def _choices(tokens: list[int], scored: Scored, states: States) -> list[Choice]:
    """Tokens with the details that their sequences want."""
    wanted = [state.details for state in states]
    if not any(details.output for details in wanted):
        return [Choice(token) for token in tokens]
    described = describe(scored, wanted, _possible(scored))
    return [
        Choice(token, details if state.details.output else None)
        for token, details, state in zip(tokens, described, states, strict=True)
    ]


def _possible(scored: Scored) -> NDArray[np.bool_] | None:
    """Of generated tokens only alternatives are shown that could have been chosen."""
    return None if scored.best is None else scored.best.scores > -np.inf


def _streams(states: States) -> list[NoiseStream]:
    return [state.noise for state in states if state.noise is not None]
