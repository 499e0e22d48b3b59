"""What the log, the metrics and the traces say of requests, however they end."""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tgis.errors import GenerationFailed, InvalidRequest, Overloaded, RequestError, Unavailable
from tgis.front.accounts import Accounts
from tgis.front.rpc import Context
from tgis.front.streams import Job, Stream, Times
from tgis.observe.logs import TextFormatter
from tgis.observe.metrics import Limits, Metrics
from tgis.observe.tracing import Event, Tracing
from tgis.proto import generation_pb2 as pb
from tgis.types import NO_DETAILS, FinishReason, SamplingParams

SECRET = "Zanzibar"
Call = tuple[str, dict[str, Any], list[Event], str | None]


@dataclass
class FakeContext:
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata


@dataclass
class FakeStream:
    seq_id: int = 7
    num_generated: int = 3
    times: Times = field(default_factory=lambda: Times(10.0, 10.5, 10.75, 11.5))
    job: Job = field(
        default_factory=lambda: Job(
            [1, 2, 3, 4], SamplingParams(), NO_DETAILS, 5, False, (), False, 10.0
        )
    )


@dataclass
class Spans:
    """What would have been sent."""

    calls: list[Call] = field(default_factory=list)

    def record(self, name, caller, start, attributes, events, error) -> None:
        self.calls.append((name, dict(attributes), list(events), error))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Limits(16, 8, 4))


def failures(metrics: Metrics) -> dict[str, float]:
    """The causes that have been counted."""
    start = 'tgi_request_failure_total{err="'
    lines = [x[len(start) :] for x in metrics.render().decode().splitlines() if x.startswith(start)]
    found = {line.partition('"')[0]: float(line.split()[-1]) for line in lines}
    return {cause: number for cause, number in found.items() if number}


def request(**parameters: Any) -> pb.BatchedGenerationRequest:
    return pb.BatchedGenerationRequest(params=pb.Parameters(**parameters))


def enter(
    accounts: Accounts,
    kind: str = "single",
    context: FakeContext | None = None,
    message: pb.BatchedGenerationRequest | None = None,
):
    texts = [SECRET] * (2 if kind == "batch" else 1)
    return accounts.call(
        kind,
        texts,
        message or pb.BatchedGenerationRequest(),
        cast(Context, context or FakeContext()),
    )


def streams(number: int = 1) -> list[Stream]:
    return [cast(Stream, FakeStream(seq_id=7 + i)) for i in range(number)]


def shown(record: logging.LogRecord) -> str:
    return TextFormatter("front").format(record)


@pytest.mark.parametrize("log_prompts", [True, False])
def test_user_text_in_the_log_is_a_setting(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    accounts = Accounts(metrics, log_prompts=log_prompts)
    stops = pb.StoppingCriteria(max_new_tokens=3, stop_sequences=["secret stop"])
    guided = pb.DecodingParameters(regex="secret regex")
    message = request(stopping=stops, decoding=guided)
    with caplog.at_level(logging.INFO), enter(accounts, message=message) as call:
        (output,) = call.accepted(streams())
        output.add("out\nput")
        accounts.finished(call, output, FinishReason.EOS_TOKEN)
    (record,) = caplog.records
    line = shown(record)
    assert ("Request generated 3 tokens before EosToken, output 7 bytes" in line) is True
    assert (SECRET in line) is (': "out\\nput"' in line) is log_prompts
    assert "secret" not in line
    assert "stop_sequences: (1)" in line
    assert "regex: (...)" in line
    assert "total_time=1500.000ms" in line


@pytest.mark.parametrize(
    ("kind", "opened", "error", "cause"),
    [
        ("single", False, InvalidRequest("wrong"), None),  # counted where it is found
        ("stream", False, Overloaded("too much"), None),
        ("single", False, Unavailable("no core"), "generate"),
        ("stream", False, Unavailable("no core"), "unknown"),
        ("single", True, GenerationFailed("bad"), "generate"),
        ("stream", True, GenerationFailed("bad"), "generate"),
        ("stream", True, Unavailable("died"), "generate"),
        ("batch", True, Unavailable("died"), "generate"),
    ],
)
def test_failures_have_one_cause_and_one_line(
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    opened: bool,
    error: RequestError,
    cause: str | None,
) -> None:
    def fail() -> None:
        with enter(Accounts(metrics), kind) as call:
            if opened:
                call.accepted(streams(2 if kind == "batch" else 1))
            raise error

    with pytest.raises(type(error)):
        fail()
    assert failures(metrics) == ({} if cause is None else {cause: 1})
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is None
    message = record.getMessage()
    assert message.endswith(str(error))
    assert message.startswith("Streaming response failed after 3 tokens") is (
        kind == "stream" and opened
    )


def test_an_overload_does_not_flood_the_log(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    now = 5.0
    accounts = Accounts(metrics, clock=lambda: now)

    def refuse() -> None:
        with pytest.raises(Overloaded), enter(accounts):
            raise Overloaded("Model is overloaded")

    for _ in range(100):
        refuse()
    assert [record.getMessage() for record in caplog.records] == ["Model is overloaded"] * 10
    now = 6.0
    caplog.clear()
    refuse()
    more, one = (record.getMessage() for record in caplog.records)
    assert more == "Model was overloaded: 90 more requests were refused"
    assert one == "Model is overloaded"
    now = 9.0
    caplog.clear()
    refuse()
    assert [record.getMessage() for record in caplog.records] == ["Model is overloaded"]


@pytest.mark.parametrize("ending", [asyncio.CancelledError, GeneratorExit])
def test_a_client_that_goes_cancels_each_input_that_is_not_complete(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, ending: type[BaseException]
) -> None:
    accounts = Accounts(metrics)

    def leave() -> None:
        with enter(accounts, "batch") as call:
            first, _ = call.accepted(streams(2))
            accounts.finished(call, first, FinishReason.MAX_TOKENS)
            raise ending

    with caplog.at_level(logging.INFO), pytest.raises(ending):
        leave()
    assert failures(metrics) == {"cancelled": 1}
    (record,) = (x for x in caplog.records if x.levelno == logging.WARNING)
    assert record.getMessage().startswith("Sub-request 1 from batch of 2 generated 3 tokens")
    assert "before Cancelled" in record.getMessage()


def test_a_time_limit_in_the_queue_is_a_failure_and_a_success(metrics: Metrics) -> None:
    accounts = Accounts(metrics)
    with enter(accounts) as call:
        (output,) = call.accepted(
            [cast(Stream, FakeStream(num_generated=0, times=Times(10.0, 11.0, 0.0, 11.0)))]
        )
        accounts.finished(call, output, FinishReason.TIME_LIMIT)
    assert failures(metrics) == {"timeout": 1}
    text = metrics.render().decode()
    assert 'tgi_request_success_total{stop_reason="TIME_LIMIT",kind="single"} 1.0' in text
    assert "tgi_request_inference_duration_sum 0.0" in text


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        (None, "<none>"),
        ("abc-1", "abc-1"),
        ("i" * 5000, "i" * 128),
        ("ü", "<non-ascii>"),
    ],
)
def test_correlation_ids(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, sent: str | None, logged: str
) -> None:
    metadata: tuple[tuple[str, str | bytes], ...] = (("x-other-bin", b"\x00"),)
    if sent is not None:
        metadata += (("x-correlation-id", sent),)
    context = FakeContext(metadata)
    with pytest.raises(InvalidRequest), enter(Accounts(metrics), context=context):
        raise InvalidRequest("wrong")
    (record,) = caplog.records
    assert record.__dict__["span"]["correlation_id"] == logged


def test_a_span_has_counts_and_events_and_no_text(metrics: Metrics) -> None:
    spans = Spans()
    accounts = Accounts(metrics, tracing=cast(Tracing, spans))
    with enter(accounts, "batch") as call:
        call.validated = 10.25
        for output in call.accepted(streams(2)):
            output.add(SECRET)
            accounts.finished(call, output, FinishReason.MAX_TOKENS)
    ((name, attributes, events, error),) = spans.calls
    assert (name, error) == ("generate", None)
    assert attributes["tgis.inputs"] == 2
    assert attributes["gen_ai.usage.input_tokens"] == 8
    assert attributes["gen_ai.usage.output_tokens"] == 6
    assert attributes["gen_ai.response.finish_reasons"] == ["MAX_TOKENS"] * 2
    assert [event.name for event in events] == [
        "validated",
        *["inference started", "first token", "last token"] * 2,
    ]
    assert [event.at for event in events[:4]] == [10.25, 10.5, 10.75, 11.5]
    assert SECRET not in repr(spans)


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        (InvalidRequest("wrong"), "InvalidRequest"),
        (asyncio.CancelledError(), "Cancelled"),
        (KeyError(SECRET), "KeyError"),
    ],
)
def test_every_request_has_a_span(metrics: Metrics, ending: BaseException, error: str) -> None:
    spans = Spans()
    accounts = Accounts(metrics, tracing=cast(Tracing, spans))
    with pytest.raises(type(ending)), enter(accounts, "stream"):
        raise ending
    ((name, _, _, found),) = spans.calls
    assert (name, found) == ("generate_stream", error)
    assert SECRET not in repr(spans)
