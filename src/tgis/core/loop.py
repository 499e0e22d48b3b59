"""The loop of the core: ingest -> schedule -> run -> account -> emit.

Every `Add` gets exactly one terminal message, whatever happens in between, and what fails in a step
fails alone.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch

from tgis.core import runner
from tgis.core.adapters import Adapters
from tgis.core.link import FrontLink, Gone
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import Opening, Sequence, decoder_only
from tgis.core.speculation import NO_SPECULATION, Speculation, Turn
from tgis.engines.base import Engine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.sampling import Choice, Sampler, input_details
from tgis.types import Cause, FinishReason, TokenOut
from tgis.wire import (
    Abort,
    Add,
    Failed,
    FailureKind,
    Gauges,
    Hold,
    InputDetails,
    Lookup,
    NotFound,
    Out,
    StepStats,
    ToCore,
    Unpin,
)

log = logging.getLogger(__name__)

Clock = Callable[[], float]


class Pulse(Protocol):
    """What the loop tells the heartbeat."""

    step_started: float  # of the step under way; 0 = idle
    gauges: Gauges


class _Outbox:
    """What one step has to say to one front."""

    def __init__(self) -> None:
        self.tokens: list[TokenOut] = []
        self.inputs: list[InputDetails] = []
        self.started: list[tuple[int, float]] = []
        self.stats: StepStats | None = None


def _rows_of(logits: torch.Tensor, picks: list[int]) -> torch.Tensor:
    if len(picks) == len(logits):
        return logits
    return logits[picks[0] : picks[0] + 1] if len(picks) == 1 else logits[picks]


def _failure(error: Exception) -> tuple[FailureKind, str]:
    """What a front is told of an error."""
    if runner.is_out_of_memory(error):
        return FailureKind.OUT_OF_MEMORY, "out of memory"
    return FailureKind.GENERATION, type(error).__name__


class Core:
    """Owns the sequences and drives scheduler, engine and sampler.

    Args:
        engine: the loaded model, its cache allocated.
        pulse: what the heartbeat reads.
        clock: CLOCK_MONOTONIC seconds; replaced in tests.
        opening: how sequences begin.
        adapters: None = there is no store of adapters.
        pad_id: stands for the tokens of soft prompts.
        speculation: adds drafts to steps.
        compilations: graphs that were compiled since it was asked last.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        scheduler: Scheduler,
        link: FrontLink,
        pulse: Pulse,
        clock: Clock = time.monotonic,
        opening: Opening = decoder_only,
        adapters: Adapters | None = None,
        pad_id: int = 0,
        speculation: Speculation = NO_SPECULATION,
        compilations: Callable[[], int] = lambda: 0,
    ) -> None:
        self._engine = engine
        self._sampler = sampler
        self._scheduler = scheduler
        self._link = link
        self._pulse = pulse
        self._opening = opening
        self._adapters = adapters
        self._pad_id = pad_id
        self._speculation = speculation
        self._compilations = compilations
        self._clock = clock
        self._sequences: dict[tuple[int, int], Sequence] = {}  # (client, seq_id)
        self._by_uid: dict[int, Sequence] = {}
        self._next_uid = 0
        self._outboxes: dict[int, _Outbox] = {}
        self._fault: str | None = None  # reported already
        self._stalled = False  # there is work, but nothing that can be computed now

    def turn(self, wait: float) -> bool:
        """Ingest, then a step if there is work; says whether there was.

        Args:
            wait: seconds to wait for a message when there is nothing to do.
        """
        self._ingest(0.0 if self._scheduler.has_work and not self._stalled else wait)
        if had_work := self._scheduler.has_work:
            self._pulse.step_started = self._clock()
            self._step()
            self._pulse.step_started = 0.0
            self._check_idle()
        else:
            self._pulse.gauges = self._scheduler.gauges()  # what an abort has left
        return had_work

    def check(self) -> str | None:
        """What is wrong with the accounts, if anything."""
        known = self._scheduler.num_waiting + self._scheduler.num_running
        if not len(self._by_uid) == len(self._sequences) == known:
            return f"{len(self._by_uid)} sequences, of which the scheduler knows {known}"
        if self._adapters is not None and not known and (fault := self._adapters.check()):
            return fault
        return self._scheduler.check()

    def _check_idle(self) -> None:
        """When there is nothing to do, look for leaks; they are reported, never fatal."""
        if self._scheduler.has_work:
            return
        fault = self.check()
        if fault is not None and fault != self._fault:
            log.error("the accounts are wrong: %s", fault)
        self._fault = fault

    def _ingest(self, wait: float) -> None:
        for client, message in self._link.receive(wait):
            self._take(client, message)
        if self._adapters is not None:
            self._adapters.settle()

    def _take(self, client: int, message: ToCore | Gone) -> None:
        match message:
            case Add():
                self._add(client, message)
            case Abort():
                for seq_id in message.seq_ids:
                    self._drop(self._sequences.get((client, seq_id)))
            case Hold():
                if (seq := self._sequences.get((client, message.seq_id))) is not None:
                    seq.held = message.held
            case Lookup():
                if self._adapters is not None:
                    self._adapters.lookup(client, message)
                else:
                    none = NotFound(message.lookup_id, Cause.MISSING, "there is no store", None)
                    self._link.send(client, none)
            case Unpin():
                if self._adapters is not None:
                    self._adapters.unpin(client, message.handle)
            case Gone():
                for seq in [seq for seq in self._by_uid.values() if seq.client == client]:
                    self._drop(seq)
                if self._adapters is not None:
                    self._adapters.gone(client)

    def _add(self, client: int, request: Add) -> None:
        adapter = None
        if request.adapter:
            adapter = self._adapters.get(request.adapter) if self._adapters else None
            if adapter is None:
                text = "its adapter is not loaded any more; try again"
                self._link.send(client, Failed(request.seq_id, FailureKind.UNAVAILABLE, text))
                return
        seq = Sequence.of(self._next_uid, request, client, self._opening, adapter, self._pad_id)
        self._next_uid += 1
        try:
            self._sampler.add(seq.uid, request.sampling, request.details, seq.real_ids)
        except Exception as error:
            log.exception("a sequence could not be added")
            self._link.send(client, Failed(request.seq_id, *_failure(error)))
            return
        self._sequences[client, request.seq_id] = self._by_uid[seq.uid] = seq
        if adapter is not None and self._adapters is not None:
            self._adapters.hold(adapter)
        self._scheduler.add(seq)

    def _drop(self, seq: Sequence | None, sound: bool = True) -> None:
        """Take a live sequence out of everything; what is not sound does not stay in the cache."""
        if seq is not None:
            self._scheduler.remove(seq, keep=sound)
            self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        self._sampler.remove(seq.uid)
        self._speculation.forget(seq.uid)
        del self._sequences[seq.client, seq.request.seq_id], self._by_uid[seq.uid]
        if seq.adapter is not None and self._adapters is not None:
            self._adapters.let_go(seq.adapter)

    def _fail(self, seq: Sequence, kind: FailureKind, message: str) -> None:
        self._drop(seq, sound=False)
        self._link.send(seq.client, Failed(seq.request.seq_id, kind, message))

    def _step(self) -> None:
        start = self._clock()
        for seq in self._scheduler.expire(start):
            self._forget(seq)
            self._outbox(seq).tokens.append(
                TokenOut(seq.request.seq_id, -1, FinishReason.TIME_LIMIT)
            )
        plan = self._scheduler.schedule()
        self._stalled = not plan.rows
        self._release()
        if plan.rows:
            self._speculation.extend(plan, self._by_uid, self._scheduler)
            self._note_started(plan, start)
            reporter = self._outbox(self._by_uid[plan.rows[0].seq_id])
            prompts = [row for row in plan.rows if self._is_prompt(row)]
            result = runner.run(self._engine, plan, self._clock)
            tokens_start = self._clock()
            for broken in result.broken:
                self._fail_rows(broken.rows, broken.error)
            num_joined = sum(self._account_safely(part) for part in result.done)
            end = self._clock()
            reporter.stats = StepStats(
                duration=end - start,
                forward_duration=result.seconds,
                tokens_duration=end - tokens_start,
                num_prefill_seqs=len(prompts),
                num_prefill_tokens=self._scheduler.batch_tokens(prompts),
                num_decode_seqs=len(plan.rows) - len(prompts),
                num_joined=num_joined if len(prompts) < len(plan.rows) else 0,
                num_calls=result.num_calls,
                num_errors=result.num_errors,
                num_out_of_memory=result.num_out_of_memory,
                counts=self._scheduler.drain_counts(),
                drafts=self._speculation.drain_counts(),
                num_compiled=self._compilations(),
            )
            self._release()
        self._emit()

    def _release(self) -> None:
        released = self._scheduler.drain_released()
        if released:
            try:
                self._engine.release(released)
            except Exception:  # they are free all the same; their pages stay for now
                log.exception("the memory of %d rows could not be given back", len(released))

    def _is_prompt(self, row: Row) -> bool:
        """Whether a row prefills: a prompt, or a sequence that is computed anew."""
        num_known = len(row.token_ids) - row.num_drafts
        return num_known > 1 or self._by_uid[row.seq_id].num_generated == 0

    def _note_started(self, plan: StepPlan, now: float) -> None:
        for row in plan.rows:
            seq = self._by_uid[row.seq_id]
            if not seq.started:
                seq.started = True
                self._outbox(seq).started.append((seq.request.seq_id, now))

    def _fail_rows(self, rows: list[Row], error: Exception) -> None:
        for row in rows:
            seq = self._by_uid.get(row.seq_id)
            if seq is not None:
                self._fail(seq, *_failure(error))

    def _account_safely(self, part: runner.Done) -> int:
        try:
            return self._account(part.rows, part.logits)
        except Exception as error:
            log.exception("the tokens of a step could not be chosen")
            self._fail_rows(part.rows, error)
            return 0

    def _account(self, rows: list[Row], logits: torch.Tensor) -> int:
        """Note what has been computed, and choose a token for each sequence that is complete.

        Returns:
            The sequences that got their first token.
        """
        ready: list[Turn] = []
        offset = 0
        for row in rows:
            seq = self._by_uid[row.seq_id]
            self._scheduler.account(seq, row)
            first, offset = offset, offset + row.num_logits
            if row.want is Want.ALL and not row.num_drafts:
                try:
                    self._note_inputs(seq, row, logits[first:offset])
                except Exception as error:
                    log.exception("the details of an input could not be made")
                    self._fail_rows([row], error)
                    continue
            if seq.num_computed == len(seq.token_ids):
                drafts = row.token_ids[len(row.token_ids) - row.num_drafts :]
                ready.append(Turn(seq, offset - 1 - row.num_drafts, drafts))
        if not ready:
            return 0
        num_first = sum(turn.seq.num_generated == 0 for turn in ready)
        together = [turn for turn in ready if not turn.seq.sampled_alone]
        alone = [[turn] for turn in ready if turn.seq.sampled_alone]
        for part in ([together] if together else []) + alone:
            self._choose(part, logits)
        for turn in ready:
            if turn.drafts:
                self._speculation.note(turn.seq, len(turn.drafts), turn.accepted)
        return num_first

    def _choose(self, turns: list[Turn], logits: torch.Tensor) -> None:
        """Choose the next token of each sequence, and go on where it is the one that was drafted.

        The sampler chooses from every position as it would without drafts, one token after the
        other; so drafts change no output, whatever its parameters are.
        """
        while turns:
            try:
                chosen = _rows_of(logits, [turn.pick for turn in turns])
                choices = self._sampler.sample([turn.seq.uid for turn in turns], chosen)
            except Exception as error:
                self._cannot_choose([turn.seq for turn in turns], error)
                return
            now = self._clock()
            goes_on = []
            for turn, choice in zip(turns, choices, strict=True):
                turn.seq.sampled_alone = False
                if self._append(turn.seq, choice, now) and turn.accepts(choice.token_id):
                    self._scheduler.accept(turn.seq)
                    goes_on.append(turn)
            turns = goes_on

    def _cannot_choose(self, seqs: list[Sequence], error: Exception) -> None:
        """Of several, one may be at fault: their last token is computed again in the next step, and
        each then chooses alone. An engine that cannot step back fails them all.
        """
        log.error("a token could not be chosen for %d sequences", len(seqs), exc_info=error)
        can_step_back = self._engine.caps.kv_layout != "padded"
        for seq in seqs:
            begins_anew = seq.num_computed == 1 and bool(seq.encoder_ids)
            if len(seqs) > 1 and can_step_back and not begins_anew:
                seq.num_computed -= 1
                seq.sampled_alone = True
            else:
                self._fail(seq, *_failure(error))

    def _note_inputs(self, seq: Sequence, row: Row, logits: torch.Tensor) -> None:
        """Details of the prompt tokens that follow this row's positions, each noted once."""
        first = len(seq.input_details)  # details exist of prompt tokens 1..first
        last = min(row.start + len(row.token_ids), seq.num_prompt - 1)
        if last > first:
            wanted = logits[first - row.start : last - row.start]
            next_ids = seq.token_ids[first + 1 : last + 1]
            seq.input_details += input_details(wanted, next_ids, seq.request.details)

    def _append(self, seq: Sequence, choice: Choice, now: float) -> bool:
        """Add a chosen token; returns whether the sequence goes on."""
        if choice.error is not None:
            self._fail(seq, FailureKind.GENERATION, choice.error)
            return False
        box = self._outbox(seq)
        if seq.num_generated == 0 and seq.request.details.input:
            box.inputs.append(InputDetails(seq.request.seq_id, seq.input_details))
        reason = self._scheduler.append(seq, choice.token_id, now)
        box.tokens.append(TokenOut(seq.request.seq_id, choice.token_id, reason, choice.details))
        if reason is FinishReason.NOT_FINISHED:
            return True
        self._forget(seq)
        return False

    def _outbox(self, seq: Sequence) -> _Outbox:
        box = self._outboxes.get(seq.client)
        if box is None:
            box = self._outboxes[seq.client] = _Outbox()
        return box

    def _emit(self) -> None:
        gauges = self._pulse.gauges = self._scheduler.gauges()
        for client, box in self._outboxes.items():
            self._link.send(client, Out(box.tokens, box.inputs, box.started, box.stats, gauges))
        self._outboxes.clear()
