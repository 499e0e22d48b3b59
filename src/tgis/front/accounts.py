"""What is noted of each request: metrics, a log line for each input, and a trace span.

Everything is noted when something ends; a token on its way costs nothing here but the size of the
text of streams.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tgis.errors import Overloaded, RequestError, Unavailable
from tgis.front.intake import Request
from tgis.front.rpc import CORRELATION_ID, Context, metadata_of
from tgis.front.streams import Stream
from tgis.observe.logs import clip
from tgis.observe.metrics import Metrics
from tgis.observe.tracing import Event, Tracing, Value
from tgis.proto import generation_pb2 as pb
from tgis.types import FinishReason

log = logging.getLogger("tgis.front.requests")

_COLUMNS = 32  # of user text in a log line
_HEAD = 2 * _COLUMNS  # characters of an output that are kept for its log line
_MAX_ID = 128  # characters of a client's identifiers in a log line
_MOST_REFUSALS = 10  # lines a second about requests that were refused for overload

_LEVELS = {
    FinishReason.CANCELLED: logging.WARNING,
    FinishReason.TOKEN_LIMIT: logging.WARNING,
}
_KINDS = {"single": "Request", "stream": "Streaming response"}
_REASONS = {
    reason: reason.name.title().replace("_", "")
    for reason in FinishReason  # MaxTokens
}


@dataclass(slots=True)
class Output:
    """What has been generated for one input so far, as far as the log wants to know."""

    stream: Stream
    num_bytes: int = 0
    head: str = ""
    finish: FinishReason = FinishReason.NOT_FINISHED

    def add(self, text: str) -> None:
        """Text has been handed to the client."""
        self.num_bytes += len(text.encode(errors="replace"))
        if len(self.head) <= _HEAD:
            self.head += text[: _HEAD + 1]


@dataclass(slots=True)
class Call:
    """One request under way.

    Attributes:
        kind: single, batch or stream.
        arrival: CLOCK_MONOTONIC seconds.
    """

    kind: str
    texts: Sequence[str]
    request: Request
    metadata: Mapping[str, str]
    arrival: float = field(default_factory=time.monotonic)
    validated: float = 0.0
    outputs: list[Output] = field(default_factory=list)

    def accepted(self, streams: Sequence[Stream]) -> list[Output]:
        """Its inputs are valid and on their way; returns what is to be told of each."""
        self.outputs = [Output(stream) for stream in streams]
        return self.outputs

    @property
    def unfinished(self) -> list[Output]:
        """The inputs that have not been completed."""
        return [out for out in self.outputs if out.finish is FinishReason.NOT_FINISHED]

    def title(self, output: Output) -> str:
        """What the log calls one of the inputs."""
        number = self.outputs.index(output)
        return _KINDS.get(self.kind) or f"Sub-request {number} from batch of {len(self.outputs)}"


class _Refusals:
    """Which of the requests that are refused for overload get a line: an overload is no time for
    one each. The others are counted.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._second = 0
        self._num = 0  # in this second

    def are_told(self) -> bool:
        """Whether one more gets its line."""
        second = int(self._clock())
        if second != self._second:
            if self._num > _MOST_REFUSALS:
                more = self._num - _MOST_REFUSALS
                log.error("Model was overloaded: %d more requests were refused", more)
            self._second, self._num = second, 0
        self._num += 1
        return self._num <= _MOST_REFUSALS


class Accounts:
    """Request metrics, completion log and traces.

    Args:
        log_prompts: show the first 32 columns of inputs and outputs in the log.
        tracing: where spans go; None for nowhere.
        clock: CLOCK_MONOTONIC seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        log_prompts: bool = True,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._refusals = _Refusals(clock)
        self._metrics = metrics
        self._log_prompts = log_prompts
        self._tracing = tracing

    @contextmanager
    def call(
        self, kind: str, texts: Sequence[str], request: Request, context: Context
    ) -> Iterator[Call]:
        """Note one request from its arrival to its end, however it ends."""
        call = Call(kind, texts, request, metadata_of(context))
        self._metrics.count("tgi_request_count", kind=kind)
        if texts:
            self._metrics.count("tgi_request_input_count", len(texts))
        error: str | None = None
        try:
            yield call
        except RequestError as failure:
            error = type(failure).__name__
            self._failed(call, failure)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            error = "Cancelled"
            self._cancelled(call)
            raise
        except Exception as failure:  # a defect; `tgis.front.rpc` logs it
            error = type(failure).__name__
            raise
        finally:
            if self._tracing is not None:
                self._trace(self._tracing, call, error)

    def finished(self, call: Call, output: Output, finish: FinishReason) -> None:
        """One input is complete, and its whole text is with the client."""
        output.finish = finish
        stream, metrics = output.stream, self._metrics
        times, num_tokens = stream.times, stream.num_generated
        inference = times.last_token - times.started
        if finish is FinishReason.TIME_LIMIT and not num_tokens:  # still in the queue
            metrics.count("tgi_request_failure", err="timeout")
        metrics.count("tgi_request_success", stop_reason=finish.name, kind=call.kind)
        metrics.observe("tgi_request_inference_duration", inference)
        metrics.observe(
            "tgi_request_mean_time_per_token_duration",
            inference / num_tokens if num_tokens else 0.0,
        )
        metrics.observe("tgi_request_duration", times.last_token - times.arrival)
        metrics.observe("tgi_request_generated_tokens", num_tokens)
        metrics.observe("tgi_request_total_tokens", num_tokens + len(stream.job.token_ids))
        self._log_end(call, output)

    @contextmanager
    def tokenize(self, num_texts: int) -> Iterator[Callable[[int], None]]:
        """Count a Tokenize call; what it yields is told the number of tokens at the end."""
        start = time.monotonic()
        self._metrics.count("tgi_tokenize_request_count")
        self._metrics.count("tgi_tokenize_request_input_count", num_texts)

        def note(num_tokens: int) -> None:
            self._metrics.observe("tgi_tokenize_request_tokens", num_tokens)
            self._metrics.observe("tgi_tokenize_request_duration", time.monotonic() - start)

        yield note

    def _failed(self, call: Call, error: RequestError) -> None:
        if not call.outputs and not isinstance(error, Unavailable):
            # Refused: counted there.
            if not isinstance(error, Overloaded) or self._refusals.are_told():
                log.error("%s", error, extra={"span": self._span(call)})
            return
        not_queued = call.kind == "stream" and not call.outputs
        self._metrics.count("tgi_request_failure", err="unknown" if not_queued else "generate")
        for output in call.unfinished:
            output.finish = FinishReason.ERROR
        if call.kind == "stream" and call.outputs:
            (output,) = call.outputs
            log.error(
                "Streaming response failed after %d tokens, output so far: '%s': %s",
                output.stream.num_generated,
                self._shown(output.head),
                error,
                extra={"span": self._span(call, output)},
            )
        else:
            log.error("%s", error, extra={"span": self._span(call)})

    def _cancelled(self, call: Call) -> None:
        if not call.outputs:  # before its inputs were on their way
            self._metrics.count("tgi_request_failure", len(call.texts), err="cancelled")
        for output in call.unfinished:
            output.finish = FinishReason.CANCELLED
            self._metrics.count("tgi_request_failure", err="cancelled")
            self._log_end(call, output)

    def _log_end(self, call: Call, output: Output) -> None:
        """The completion line."""
        level = _LEVELS.get(output.finish, logging.INFO)
        if not log.isEnabledFor(level):
            return
        shown = f': "{self._shown(output.head)}"' if self._log_prompts else ""
        log.log(
            level,
            "%s generated %d tokens before %s, output %d bytes%s",
            call.title(output),
            output.stream.num_generated,
            _REASONS[output.finish],
            output.num_bytes,
            shown,
            extra={"span": self._span(call, output)},
        )

    def _shown(self, text: str) -> str:
        return clip(text, _COLUMNS) if self._log_prompts else "..."

    def _span(self, call: Call, output: Output | None = None) -> dict[str, object]:
        """What the log says of a request beside the message."""
        span: dict[str, object] = {
            "name": "generate_stream" if call.kind == "stream" else "generate",
            "correlation_id": _identifier(call.metadata.get(CORRELATION_ID)),
            "input_bytes": [len(text.encode(errors="replace")) for text in call.texts],
            "params": _parameters(call.request),
        }
        if call.request.prefix_id or call.request.adapter_id:
            span["prefix_id"] = _identifier(call.request.prefix_id or call.request.adapter_id)
        if self._log_prompts:
            span["input"] = [clip(text, _COLUMNS) for text in call.texts]
        if call.validated:
            span["validation_time"] = _duration(call.validated - call.arrival)
        if output is not None:
            span |= _numbers(output.stream)
        return span

    def _trace(self, tracing: Tracing, call: Call, error: str | None) -> None:
        streams = [output.stream for output in call.outputs]
        attributes: dict[str, Value] = {
            "rpc.system": "grpc",
            "rpc.method": "GenerateStream" if call.kind == "stream" else "Generate",
            "tgis.kind": call.kind,
            "tgis.inputs": len(call.texts),
            "gen_ai.usage.input_tokens": sum(len(stream.job.token_ids) for stream in streams),
            "gen_ai.usage.output_tokens": sum(stream.num_generated for stream in streams),
            "gen_ai.response.finish_reasons": [output.finish.name for output in call.outputs],
        }
        if CORRELATION_ID in call.metadata:
            attributes["correlation_id"] = _identifier(call.metadata[CORRELATION_ID])
        events = [Event("validated", call.validated, {})] if call.validated else []
        for number, stream in enumerate(streams):
            events += _events(number, stream)
        name = "generate_stream" if call.kind == "stream" else "generate"
        tracing.record(name, call.metadata, call.arrival, attributes, events, error)


def _events(number: int, stream: Stream) -> Iterator[Event]:
    """What happened to one input, as far as it came."""
    times = stream.times
    which: dict[str, Value] = {"tgis.input": number}
    if times.started:
        waited = times.started - times.arrival
        yield Event("inference started", times.started, which | {"tgis.queue_time": waited})
    if times.first_token:
        yield Event("first token", times.first_token, which)
        took = times.last_token - times.started
        yield Event("last token", times.last_token, which | {"tgis.inference_time": took})


def _numbers(stream: Stream) -> dict[str, object]:
    times, num_tokens = stream.times, stream.num_generated
    numbers: dict[str, object] = {
        "request_id": stream.seq_id,
        "input_toks": len(stream.job.token_ids),
    }
    if not times.started:
        return numbers
    end = times.last_token or time.monotonic()
    inference = end - times.started
    return numbers | {
        "queue_time": _duration(times.started - times.arrival),
        "inference_time": _duration(inference),
        "time_per_token": _duration(inference / num_tokens if num_tokens else 0.0),
        "total_time": _duration(end - times.arrival),
    }


def _parameters(request: Request) -> str:
    """The parameters on one line, without what may be user text."""
    if not request.HasField("params"):
        return "None"
    params = pb.Parameters()
    params.CopyFrom(request.params)
    num_stops = len(params.stopping.stop_sequences)
    if num_stops:
        del params.stopping.stop_sequences[:]
    if guided := params.decoding.WhichOneof("guided"):
        params.decoding.ClearField(guided)
    text = " ".join(str(params).split())
    text += f" stop_sequences: ({num_stops})" if num_stops else ""
    return text + (f" {guided}: (...)" if guided else "")


def _identifier(value: str | None) -> str:
    if not value:
        return "<none>"
    return value[:_MAX_ID] if value.isascii() else "<non-ascii>"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}ms"
