"""Spans as a receiver sees them that speaks OTLP/gRPC."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.observe.tracing import Event, Tracing, check_available

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
trace_service_grpc = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc"
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@dataclass
class Receiver:
    """An OTLP endpoint that keeps what it gets."""

    endpoint: str = ""
    requests: list[Any] = field(default_factory=list)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        return trace_service.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield receiver
    server.stop(None).wait()


def attributes(item: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in item.attributes
    }


def test_a_span_arrives_whole_and_joins_the_callers_trace(receiver: Receiver) -> None:
    tracing = Tracing(receiver.endpoint, "a service")
    start = time.monotonic() - 2
    tracing.record(
        "generate",
        {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "other": "x"},
        start,
        {"tgis.inputs": 2, "gen_ai.response.finish_reasons": ["EOS_TOKEN", "MAX_TOKENS"]},
        [Event("first token", start + 0.5, {"tgis.input": 1})],
        None,
    )
    tracing.close()
    (span,) = receiver.spans
    assert span.name == "generate"
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    assert span.trace_state == "a=b"
    assert span.kind == span.SPAN_KIND_SERVER
    assert span.status.code == span.status.STATUS_CODE_UNSET
    assert attributes(span)["tgis.inputs"] == 2
    assert 2 <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 < 60
    assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 60
    (event,) = span.events
    assert event.name == "first token"
    assert (event.time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(0.5, abs=0.1)
    assert attributes(event) == {"tgis.input": 1}
    (resource,) = (item.resource for item in receiver.requests[0].resource_spans)
    assert attributes(resource)["service.name"] == "a service"


@pytest.mark.parametrize("traceparent", [None, "garbage", f"00-{'0' * 32}-{PARENT}-01"])
def test_without_a_usable_parent_a_trace_begins(
    receiver: Receiver, traceparent: str | None
) -> None:
    tracing = Tracing(receiver.endpoint, "a service")
    caller = {} if traceparent is None else {"traceparent": traceparent}
    tracing.record("generate", caller, time.monotonic(), {}, [], "GenerationFailed")
    tracing.close()
    (span,) = receiver.spans
    assert span.parent_span_id == b""
    assert any(span.trace_id)
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert span.status.message == "GenerationFailed"


def test_tracing_without_its_packages_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    check_available(Config(otlp_endpoint="http://h:1"))
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_available(Config())
    with pytest.raises(ConfigError, match=r"--otlp-endpoint=http://h:1: .*'tgis\[otlp\]'"):
        check_available(Config(otlp_endpoint="http://h:1"))


def test_nothing_of_it_is_imported_until_asked_for() -> None:
    code = (
        "import sys, tgis.front.__main__\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
