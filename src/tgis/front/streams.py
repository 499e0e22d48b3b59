"""Open sequences in the front: tokens come in from the core, pieces of the answer go out.

A stream is registered before the core hears of it, so an answer can never miss it. What the core
produced and the client has not yet taken waits in one slot, where text is merged; so a slow reader
never grows a queue.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from tgis.errors import GenerationFailed, InvalidRequest, OutOfMemory, RequestError, Unavailable
from tgis.front.link import CoreLink
from tgis.front.step_metrics import note_gauges, note_step
from tgis.observe.metrics import Metrics
from tgis.text.detokenize import Detokenizer
from tgis.text.stops import StopMatcher
from tgis.text.streams import TextStream
from tgis.types import DetailParams, FinishReason, SamplingParams, TokenDetails, TokenOut
from tgis.wire import Add, Failed, FailureKind, Gauges, Out

log = logging.getLogger(__name__)

# Of what a client has not read yet; beyond it, generation waits for the client.
_MOST_UNREAD_BYTES = 8 * 1024
_PIECE_BYTES = 400  # of a token in a list, roughly, and ...
_TOP_TOKEN_BYTES = 120  # ... of each alternative to it

_FAILURES: dict[FailureKind, type[RequestError]] = {
    FailureKind.GENERATION: GenerationFailed,
    FailureKind.OUT_OF_MEMORY: OutOfMemory,
    FailureKind.INVALID: InvalidRequest,
    FailureKind.UNAVAILABLE: Unavailable,
}


@dataclass(frozen=True, slots=True)
class Job:
    """One input, ready to be generated from."""

    token_ids: list[int]
    sampling: SamplingParams
    details: DetailParams
    max_new_tokens: int
    token_limited: bool  # the sequence limit lowered max_new_tokens
    stop_sequences: tuple[str, ...]
    include_stop_sequence: bool
    arrival: float  # CLOCK_MONOTONIC seconds, as all times here
    adapter: int = 0  # handle of a lease that outlives the stream; 0 = none
    deadline: float = math.inf
    measured: bool = True  # False: a test of our own, which metrics leave out


@dataclass(slots=True)
class Piece:
    """Part of an answer: what one token added, or several when nobody asked for token lists."""

    num_generated: int  # so far
    text: str = ""
    token: TokenOut | None = None  # only if output details are wanted
    finish: FinishReason = FinishReason.NOT_FINISHED
    stop_sequence: str = ""


@dataclass(slots=True)
class Times:
    """When things happened to one sequence; 0 = not yet."""

    arrival: float
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class Answer:
    """All pieces of one sequence, collected."""

    text: str = ""
    num_generated: int = 0
    tokens: list[TokenOut] = field(default_factory=list)
    finish: FinishReason = FinishReason.NOT_FINISHED
    stop_sequence: str = ""


class Stream:
    """One sequence on its way. Use as a context manager: leaving it early aborts the sequence."""

    def __init__(self, seq_id: int, job: Job, text: TextStream, streams: "Streams") -> None:
        self.seq_id = seq_id
        self.job = job
        self.times = Times(job.arrival)
        self.input_details: list[TokenDetails] = []
        self.finished = False
        self._text = text
        self._stops = StopMatcher(job.stop_sequences, job.include_stop_sequence)
        self._streams = streams
        self.num_generated = 0
        self._pieces: list[Piece] = []
        self._unread_bytes = 0  # of `_pieces`, roughly
        self._held = False
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._collecting = False
        self._is_behind = False  # pieces of an earlier step have not been taken

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        self._streams.close(self)

    async def next(self) -> list[Piece]:
        """Wait for pieces; the last one has a finish reason.

        Raises:
            RequestError: the sequence failed.
        """
        while not self._has_news():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None and not self._pieces:
            raise self._error
        pieces, self._pieces = self._pieces, []
        self._unread_bytes = 0
        if self._held and not self.finished:
            self._hold(False)
        return pieces

    async def collect(self) -> Answer:
        """Wait for the end and put all pieces together."""
        self._collecting = True
        answer = Answer()
        texts: list[str] = []
        while answer.finish is FinishReason.NOT_FINISHED:
            for piece in await self.next():
                texts.append(piece.text)
                if piece.token is not None:
                    answer.tokens.append(piece.token)
                answer.num_generated = piece.num_generated
                answer.finish, answer.stop_sequence = piece.finish, piece.stop_sequence
        answer.text = "".join(texts)
        return answer

    def begin_step(self) -> None:
        """What is pushed from now on comes from another step."""
        self._is_behind = any(map(self._is_news, self._pieces))

    def push(self, out: TokenOut) -> None:
        """Take one token, or the end, from the core."""
        finish = out.finish
        text = ""
        if out.token_id >= 0:
            self.num_generated += 1
            text = self._text.add(out.token_id)
        if finish is FinishReason.NOT_FINISHED:
            fed = self._stops.feed(text, self.num_generated >= self.job.sampling.min_new_tokens)
            text, stop_sequence = fed.release, fed.matched or ""
            if stop_sequence:
                finish = FinishReason.STOP_SEQUENCE
        else:
            fed = self._stops.feed(text + self._text.finish(), False)
            text, stop_sequence = fed.release + self._stops.flush(), ""
            if finish is FinishReason.MAX_TOKENS and self.job.token_limited:
                finish = FinishReason.TOKEN_LIMIT
        token = out if self.job.details.output and out.token_id >= 0 else None
        self._put(Piece(self.num_generated, text, token, finish, stop_sequence))

    def fail(self, error: RequestError) -> None:
        """End with an error."""
        self._error = error
        self.finished = True
        self._wake()

    def _put(self, piece: Piece) -> None:
        self.finished = piece.finish is not FinishReason.NOT_FINISHED
        if self._pieces and not self._stays_apart(self._pieces[-1]):
            piece.text = self._pieces.pop().text + piece.text
        self._pieces.append(piece)
        if not self._collecting:
            self._note_unread(piece)
        if self._has_news():
            self._wake()

    def _note_unread(self, piece: Piece) -> None:
        """Text is merged and stays small; it is lists of tokens that fill memory."""
        if piece.token is not None:
            details = piece.token.details
            num_top = len(details.top) if details is not None else 0
            self._unread_bytes += _PIECE_BYTES + num_top * _TOP_TOKEN_BYTES
            if self._unread_bytes > _MOST_UNREAD_BYTES and not self._held and not self.finished:
                self._hold(True)

    def _hold(self, held: bool) -> None:
        self._held = held
        self._streams.link.hold(self.seq_id, held)

    def _stays_apart(self, piece: Piece) -> bool:
        """Whether a piece is a message by itself, though it has not been taken yet.

        Where tokens are listed, it always is. Text is merged if the reader is slow; but tokens of
        one step, of which speculative decoding makes several, get a message each as all do.
        """
        if self.job.details.output:
            return True
        return not self._is_behind and not self._collecting and self._is_news(piece)

    def _has_news(self) -> bool:
        if self.finished:
            return True
        return not self._collecting and any(map(self._is_news, self._pieces))

    def _is_news(self, piece: Piece) -> bool:
        """A token that adds neither text nor a list entry is not worth a message, but the first one
        says that the input has been processed.
        """
        is_first = self.job.details.input and piece.num_generated == 1
        return bool(piece.text) or piece.token is not None or is_first

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _push(stream: Stream, token: TokenOut) -> None:
    """Hand over a token; a stream that cannot take it fails alone."""
    try:
        stream.push(token)
    except Exception as error:
        log.exception("a token could not be turned into text")
        kind = OutOfMemory if isinstance(error, MemoryError) else GenerationFailed
        stream.fail(kind(_failure_text(stream, type(error).__name__)))


def _failure_text(stream: Stream, cause: str) -> str:
    if stream.num_generated:
        cause = f"Error after generating {stream.num_generated} tokens: {cause}"
    return f"Request failed during generation: {cause}"


class Streams:
    """All open streams of this front, by sequence id."""

    def __init__(self, detokenizer: Detokenizer, metrics: Metrics) -> None:
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._streams: dict[int, Stream] = {}
        self._ids = count(1)
        self.on_failure: Callable[[], None] = lambda: None  # told that the engine has failed
        self.link: CoreLink  # set by whoever makes both ends meet

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, job: Job, tenant: bytes = b"") -> Stream:
        """Register a sequence and hand it to the core.

        Args:
            tenant: who shares the engine fairly with others.

        Raises:
            Unavailable: there is no core that can serve.
        """
        seq_id = next(self._ids)
        stream = Stream(seq_id, job, self._detokenizer.stream(), self)
        self._streams[seq_id] = stream
        try:
            self.link.add(
                Add(
                    seq_id,
                    job.token_ids,
                    job.sampling,
                    job.details,
                    job.max_new_tokens,
                    job.deadline,
                    job.arrival,
                    job.adapter,
                    tenant,
                )
            )
        except Unavailable:
            del self._streams[seq_id]
            raise
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream; the core is told if it still works on it."""
        if self._streams.pop(stream.seq_id, None) is not None:
            self.link.abort([stream.seq_id])

    def on_out(self, out: Out) -> None:
        """Distribute what one step produced."""
        now = time.monotonic()
        for seq_id, at in out.started:
            if stream := self._streams.get(seq_id):
                stream.times.started = at
                if stream.job.measured:
                    waited = at - stream.times.arrival
                    self._metrics.observe("tgi_request_queue_duration", waited)
        for inputs in out.inputs:
            if stream := self._streams.get(inputs.seq_id):
                stream.input_details = inputs.details
        stopped: list[int] = []
        begun: set[int] = set()
        for token in out.tokens:
            stream = self._streams.get(token.seq_id)
            if stream is None:
                continue  # aborted while the step was under way, or stopped by an earlier token
            if token.seq_id not in begun:
                begun.add(token.seq_id)
                stream.begin_step()
            self._time(stream, now, token.token_id >= 0)
            _push(stream, token)
            if stream.finished:
                del self._streams[token.seq_id]
                if token.finish is FinishReason.NOT_FINISHED:
                    stopped.append(token.seq_id)
        if stopped:
            self.link.abort(stopped)
        note_gauges(self._metrics, out.gauges)
        if out.step is not None:
            note_step(self._metrics, out.step)

    def on_failed(self, failed: Failed) -> None:
        """End one stream with an error."""
        if failed.kind not in (FailureKind.INVALID, FailureKind.UNAVAILABLE):
            self.on_failure()
        if stream := self._streams.pop(failed.seq_id, None):
            stream.fail(_FAILURES[failed.kind](_failure_text(stream, failed.message)))

    def on_lost(self) -> None:
        """The core is gone: every open stream ends now."""
        self._metrics.count("tgi_core_lost_count")
        self.on_gauges(Gauges())
        self._fail_all("The inference engine has died and is being restarted")

    def cut_off(self) -> None:
        """The server ends now, whatever is still open."""
        self.link.abort(list(self._streams))
        self._fail_all("The server is shutting down")

    def _fail_all(self, text: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(Unavailable(text))

    def _time(self, stream: Stream, now: float, token: bool) -> None:
        times = stream.times
        if not token:
            times.started = times.started or now
        elif not times.first_token:
            times.first_token = now
            if stream.job.measured:
                waited = now - times.arrival
                self._metrics.observe("tgi_request_time_to_first_token_duration", waited)
        else:
            self._metrics.observe("tgi_request_inter_token_duration", now - times.last_token)
        times.last_token = now

    def on_gauges(self, gauges: Gauges) -> None:
        """Show the state of queue and batch."""
        note_gauges(self._metrics, gauges)
