"""Every metric, declared in one table, and how they are exposed.

Names, labels and buckets are those that TGIS documents. Each counter is exposed twice, as `name` and
as `name_total`, because dashboards read either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "duration", "text_length", "sequence", "new_tokens", "batch"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One row of the table; every kind but counter and gauge is a histogram's set of buckets."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


TABLE: tuple[Spec, ...] = (
    Spec("tgi_request_count", "counter", "Requests received", ("kind",)),
    Spec("tgi_request_input_count", "counter", "Inputs received"),
    Spec("tgi_request_failure", "counter", "Requests failed", ("err",)),
    Spec("tgi_request_success", "counter", "Inputs completed", ("stop_reason", "kind")),
    Spec("tgi_request_max_new_tokens", "new_tokens", "Limit on generated tokens asked for"),
    Spec("tgi_request_input_length", "sequence", "Input tokens after truncation"),
    Spec("tgi_request_raw_input_length", "text_length", "Input tokens before truncation"),
    Spec("tgi_request_validation_duration", "duration", "Seconds from arrival to a valid request"),
    Spec("tgi_request_queue_duration", "duration", "Seconds an input waited for its batch"),
    Spec("tgi_request_inference_duration", "duration", "Seconds from batch to last token"),
    Spec("tgi_request_mean_time_per_token_duration", "duration", "Inference seconds per token"),
    Spec("tgi_request_duration", "duration", "Seconds from arrival to last token"),
    Spec("tgi_request_time_to_first_token_duration", "duration", "Seconds to the first token"),
    Spec("tgi_request_inter_token_duration", "duration", "Seconds between tokens of an input"),
    Spec("tgi_request_generated_tokens", "new_tokens", "Generated tokens per input"),
    Spec("tgi_request_total_tokens", "sequence", "Input and generated tokens per input"),
    Spec("tgi_batch_current_size", "gauge", "Sequences in the batch"),
    Spec("tgi_batch_input_tokens", "gauge", "Tokens in the batch"),
    Spec("tgi_batch_max_remaining_tokens", "gauge", "Tokens that the batch may still generate"),
    Spec("tgi_queue_size", "gauge", "Inputs waiting"),
    Spec("tgi_batch_next_tokens", "text_length", "Prompt tokens of a step"),
    Spec("tgi_batch_inference_count", "counter", "Steps begun", ("method",)),
    Spec("tgi_batch_inference_success", "counter", "Steps completed", ("method",)),
    Spec("tgi_batch_inference_failure", "counter", "Steps failed", ("method", "reason")),
    Spec("tgi_batch_inference_batch_size", "batch", "Sequences per step", ("method",)),
    Spec(
        "tgi_batch_inference_duration", "duration", "Seconds per step", ("method", "makeup")
    ),
    Spec(
        "tgi_batch_inference_forward_duration",
        "duration",
        "Seconds of a step in the engine",
        ("method", "makeup"),
    ),
    Spec("tgi_tokenize_request_count", "counter", "Tokenize calls"),
    Spec("tgi_tokenize_request_input_count", "counter", "Texts of Tokenize calls"),
    Spec("tgi_tokenize_request_tokens", "text_length", "Tokens per Tokenize call"),
    Spec("tgi_tokenize_request_duration", "duration", "Seconds per Tokenize call"),
    Spec("tgi_kv_cache_usage", "gauge", "Share of key/value memory in use, 0 to 1"),
    Spec("tgi_preemption_count", "counter", "Sequences that gave their memory up to be recomputed"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits that histogram buckets are made of."""

    max_sequence_length: int
    max_new_tokens: int
    max_batch_size: int


def buckets(kind: Kind, limits: Limits) -> Sequence[float]:
    """Upper bounds of a histogram kind, without +Inf."""
    match kind:
        case "duration":
            return [0.0001 * 1.5**k for k in range(1, 36)]
        case "text_length":
            return [2.0**k for k in range(6, 20)]
        case "sequence":
            return [limits.max_sequence_length / 64 * i for i in range(1, 65)]
        case "new_tokens":
            return [limits.max_new_tokens / 64 * i for i in range(1, 65)]
        case "batch":
            step = -(-limits.max_batch_size // 64)
            return [float(size) for size in range(step, limits.max_batch_size + step, step)]
        case _:
            raise ValueError(f"{kind} has no buckets")


class Metrics:
    """All metrics of one server, by name."""

    def __init__(self, limits: Limits) -> None:
        self._registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        for spec in TABLE:
            self._metrics[spec.name] = self._make(spec, limits)

    def _make(self, spec: Spec, limits: Limits) -> Counter | Gauge | Histogram:
        if spec.kind == "counter":
            return Counter(spec.name, spec.help, spec.labels, registry=self._registry)
        if spec.kind == "gauge":
            return Gauge(spec.name, spec.help, spec.labels, registry=self._registry)
        return Histogram(
            spec.name,
            spec.help,
            spec.labels,
            buckets=buckets(spec.kind, limits),
            registry=self._registry,
        )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter."""
        metric = self._metrics[name]
        assert isinstance(metric, Counter)
        (metric.labels(**labels) if labels else metric).inc(amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        metric = self._metrics[name]
        assert isinstance(metric, Gauge)
        metric.set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        metric = self._metrics[name]
        assert isinstance(metric, Histogram)
        (metric.labels(**labels) if labels else metric).observe(value)

    def render(self) -> bytes:
        """The exposition text."""
        lines: list[str] = []
        for family in self._registry.collect():
            samples = [s for s in family.samples if not s.name.endswith("_created")]
            if family.type == "counter":
                lines += _family(family, family.name, [s._replace(name=family.name) for s in samples])
                lines += _family(family, family.name + "_total", samples)
            else:
                lines += _family(family, family.name, samples)
        return ("\n".join(lines) + "\n").encode()


def _family(family: Metric, name: str, samples: Sequence[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {family.documentation}"
    yield f"# TYPE {name} {family.type}"
    for sample in samples:
        labels = ",".join(f'{key}="{_escape(value)}"' for key, value in sample.labels.items())
        yield f"{sample.name}{{{labels}}} {floatToGoString(sample.value)}" if labels else (
            f"{sample.name} {floatToGoString(sample.value)}"
        )


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
