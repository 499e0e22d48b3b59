"""Counting, and the text that Prometheus reads.

`tgis.observe.table` says which metrics there are. Each counter is exposed twice, as `name` and as
`name_total`, because dashboards read either.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from tgis.observe.table import COMPAT, TABLE, Alias, Limits, Spec, buckets

__all__ = ["CONTENT_TYPE", "Limits", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All metrics of one server.

    Labels are given in the order of the table; a value that the table does not list is a KeyError.

    Args:
        limits: what buckets are made of.
        compat: for the names of `COMPAT` too, the model's name; None leaves them out.
    """

    def __init__(self, limits: Limits, compat: str | None = None) -> None:
        self._registry = CollectorRegistry()
        self._compat = compat
        self._counters: dict[tuple[str, ...], Counter] = {}
        self._gauges: dict[tuple[str, ...], Gauge] = {}
        self._observers: dict[tuple[str, ...], Histogram] = {}
        for spec in TABLE:
            self._declare(spec, limits)

    def _declare(self, spec: Spec, limits: Limits) -> None:
        """Make a metric with all its series."""
        labels = tuple(spec.labels)
        if spec.kind == "counter":
            counter = Counter(spec.name, spec.help, labels, registry=self._registry)
            for values in _series(spec):
                child = counter.labels(*values) if values else counter
                self._counters[spec.name, *values] = child
        elif spec.kind == "gauge":
            gauge = Gauge(spec.name, spec.help, labels, registry=self._registry)
            for values in _series(spec):
                self._gauges[spec.name, *values] = gauge.labels(*values) if values else gauge
        else:
            bounds = buckets(spec.kind, limits)
            histogram = Histogram(
                spec.name, spec.help, labels, buckets=bounds, registry=self._registry
            )
            for values in _series(spec):
                observer = histogram.labels(*values) if values else histogram
                self._observers[spec.name, *values] = observer

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter."""
        self._counters[name, *labels.values()].inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[name, *labels.values()].set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._observers[name, *labels.values()].observe(value)

    def render(self) -> bytes:
        """The exposition text."""
        lines: list[str] = []
        families = list(self._registry.collect())
        for family in families:
            samples = [s for s in family.samples if not s.name.endswith("_created")]
            if family.type == "counter":
                plain = [sample._replace(name=family.name) for sample in samples]
                lines += _family(family.name, family.type, family.documentation, plain)
                lines += _family(family.name + "_total", family.type, family.documentation, samples)
            else:
                lines += _family(family.name, family.type, family.documentation, samples)
        if self._compat is not None:
            lines += _aliases(families, {"model_name": self._compat})
        return ("\n".join(lines) + "\n").encode()


def _series(spec: Spec) -> Iterator[tuple[str, ...]]:
    """Each combination of label values; one empty tuple if there are no labels."""
    return itertools.product(*spec.labels.values())


def _aliases(families: Iterable[Metric], labels: Mapping[str, str]) -> Iterator[str]:
    samples: dict[str, list[Sample]] = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    for name, aliases in itertools.groupby(COMPAT, lambda alias: alias.name):
        rows = list(aliases)
        shown = [sample for alias in rows for sample in _alias(alias, samples, labels)]
        help_text = f"The same as {' plus '.join(rows[0].sources)}"
        yield from _family(name, rows[0].kind, help_text, shown)


def _alias(
    alias: Alias, samples: Mapping[str, Sequence[Sample]], labels: Mapping[str, str]
) -> Iterator[Sample]:
    if alias.kind == "histogram":
        for suffix in ("_bucket", "_sum", "_count"):
            for sample in samples[alias.sources[0] + suffix]:
                yield Sample(alias.name + suffix, {**labels, **sample.labels}, sample.value)
        return
    value = sum(
        sample.value
        for source in alias.sources
        for sample in samples[source]
        if all(sample.labels[label] in values for label, values in alias.where.items())
    )
    yield Sample(alias.name, {**labels, **alias.labels}, value)


def _family(name: str, kind: str, help_text: str, samples: Sequence[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
    for sample in samples:
        labels = ",".join(f'{key}="{_escape(value)}"' for key, value in sample.labels.items())
        value = floatToGoString(sample.value)  # type: ignore[no-untyped-call]
        yield f"{sample.name}{{{labels}}} {value}" if labels else f"{sample.name} {value}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
