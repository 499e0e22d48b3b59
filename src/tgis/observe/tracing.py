"""Traces: one OpenTelemetry span for each request, sent over OTLP/gRPC.

A span is made whole when its request has ended, so a request under way costs nothing. It joins
the trace that the caller's metadata names (W3C Trace Context). Spans hold counts and times, never
text.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tgis.config import Config
from tgis.errors import ConfigError

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")
_FLUSH_MILLISECONDS = 2000

Value = str | int | float | bool | Sequence[str]


class Event(NamedTuple):
    """Something that happened to a request; `at` is CLOCK_MONOTONIC seconds."""

    name: str
    at: float
    attributes: Mapping[str, Value]


def check_available(config: Config) -> None:
    """See that tracing can be had if it is asked for.

    Raises:
        ConfigError: the packages are not installed.
    """
    if config.otlp_endpoint and not all(map(_is_installed, _NEEDED)):
        raise ConfigError(
            f"--otlp-endpoint={config.otlp_endpoint}: tracing needs packages that are not"
            " installed; run pip install 'tgis[otlp]', or leave it unset"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


class Tracing:
    """Sends spans in the background; spans are dropped while nobody receives them.

    Args:
        endpoint: URL of the receiver; `https` means TLS.
        service_name: who we are.
    """

    def __init__(self, endpoint: str, service_name: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider, sampling
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name}),
            sampler=sampling.ALWAYS_ON,
            shutdown_on_exit=False,
        )
        insecure = not endpoint.startswith("https://")
        address = endpoint.partition("://")[2].rstrip("/")
        exporter = OTLPSpanExporter(endpoint=address, insecure=insecure)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tgis")

    def record(
        self,
        name: str,
        caller: Mapping[str, str],
        start: float,
        attributes: Mapping[str, Value],
        events: Sequence[Event],
        error: str | None,
    ) -> None:
        """Send the span of a request that ends now.

        Args:
            caller: metadata of the request, of which `traceparent` and `tracestate` are read.
            start: CLOCK_MONOTONIC seconds, as the times of `events`.
            error: what kind of error ended the request, if one did.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import (
            TraceContextTextMapPropagator,
        )

        to_epoch = time.time() - time.monotonic()
        span = self._tracer.start_span(
            name,
            context=TraceContextTextMapPropagator().extract(dict(caller)),
            kind=SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=_nanoseconds(start + to_epoch),
        )
        for event in events:
            span.add_event(event.name, dict(event.attributes), _nanoseconds(event.at + to_epoch))
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end()

    def close(self) -> None:
        """Send what is left, for a little while; may block."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
