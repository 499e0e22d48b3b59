"""The table of metrics against TGIS's documentation, and the text that Prometheus reads."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tgis.observe.metrics import Limits, Metrics
from tgis.observe.table import COMPAT, TABLE, Spec, buckets

LIMITS = Limits(max_sequence_length=2048, max_new_tokens=1024, max_batch_size=12)
SPECS = {spec.name: spec for spec in TABLE}
MOST_SERIES = 5000
METHODS = {"prefill", "next_token"}
KINDS = {"D": "duration", "T": "text_length", "S": "sequence", "N": "new_tokens", "B": "batch"}
KINDS["summary"] = "text_length"  # histograms, as TGIS's README has them


class Row(NamedTuple):
    """A row of TGIS's own documentation."""

    name: str
    kind: str
    labels: dict[str, set[str] | None]  # None = the values are told elsewhere


def documented(shared_dir: Path) -> Iterator[Row]:
    kind = ""
    for line in (shared_dir / "spec" / "metrics.md").read_text().splitlines():
        if line.startswith("## "):
            kind = line[3:].split()[0].lower().rstrip("s")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0].startswith("tgi_"):
            is_histogram = kind == "histogram"
            of = KINDS.get(cells[2], cells[2]) if is_histogram else kind
            yield Row(cells[0], of, labels_in(cells[1]) if kind != "gauge" else {})


def labels_in(cell: str) -> dict[str, set[str] | None]:
    labels: dict[str, set[str] | None] = {}
    for part in re.split(r",\s*(?![^(]*\))", re.sub(r"[`\\]", "", cell)):
        if part not in ("–", ""):
            name, _, values = re.sub(r"\s*\(.*?\)", "", part).partition("=")
            labels[name] = set(values.split("|")) if values else None
    return labels


def test_every_documented_metric_is_declared_as_documented(shared_dir: Path) -> None:
    rows = list(documented(shared_dir))
    assert len(rows) > 30
    values = {"method": METHODS, "makeup": {"single_only"}}
    for row in rows:
        spec = SPECS[row.name]
        assert spec.kind == row.kind, row.name
        assert list(spec.labels) == list(row.labels), row.name
        for label, expected in row.labels.items():
            if wanted := expected or values.get(label):
                assert set(spec.labels[label]) == wanted, row.name


def test_every_documented_error_has_a_series(shared_dir: Path) -> None:
    text = (shared_dir / "spec" / "metrics.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("`err` values"))
    words = {word for word in re.findall(r"`([a-z_]+)`", line) if not word.startswith("tgi_")}
    words -= {"err", "request"}
    assert set(SPECS["tgi_request_failure"].labels["err"]) == words


def test_stop_reasons_are_those_of_the_contract() -> None:
    from tgis.proto import generation_pb2 as pb

    never = {"NOT_FINISHED", "CANCELLED", "ERROR"}
    expected = set(pb.StopReason.keys()) - never
    assert set(SPECS["tgi_request_success"].labels["stop_reason"]) == expected


def test_buckets() -> None:
    duration = buckets("duration", LIMITS)
    assert len(duration) == 35
    assert duration[0] == pytest.approx(0.00015)
    assert duration[-1] == pytest.approx(145.6, abs=0.05)
    assert buckets("text_length", LIMITS) == [2.0**k for k in range(6, 20)]
    assert buckets("sequence", LIMITS) == [32.0 * i for i in range(1, 65)]
    assert buckets("new_tokens", LIMITS) == [16.0 * i for i in range(1, 65)]
    assert buckets("batch", LIMITS) == [float(size) for size in range(1, 13)]


@pytest.mark.parametrize("size", [1, 64, 65, 100, 128, 1000])
def test_batch_buckets_reach_the_limit_and_are_few(size: int) -> None:
    bounds = buckets("batch", Limits(2048, 1024, size))
    assert len(bounds) <= 64
    assert bounds[-1] >= size


def parsed(metrics: Metrics) -> dict[str, Metric]:
    return {
        family.name: family for family in text_string_to_metric_families(metrics.render().decode())
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """One sample, read from the exposed text by itself."""
    pairs = ",".join(f'{key}="{val}"' for key, val in labels.items())
    start = f"{name}{{{pairs}}} " if labels else f"{name} "
    lines = [x for x in metrics.render().decode().splitlines() if x.startswith(start)]
    (line,) = lines
    return float(line.rpartition(" ")[2])


def test_each_counter_has_two_names_and_one_value() -> None:
    metrics = Metrics(LIMITS)
    text = metrics.render().decode()
    for spec in TABLE:
        if spec.kind == "counter":
            assert f"# TYPE {spec.name} counter\n" in text
            assert f"# TYPE {spec.name}_total counter\n" in text
    metrics.count("tgi_request_count", kind="stream")
    metrics.count("tgi_request_input_count", 3)
    for suffix in ("", "_total"):
        assert value(metrics, "tgi_request_count" + suffix, kind="stream") == 1
        assert value(metrics, "tgi_request_count" + suffix, kind="single") == 0
        assert value(metrics, "tgi_request_input_count" + suffix) == 3


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)
def test_every_series_is_there_from_the_start(spec: Spec) -> None:
    families = parsed(Metrics(LIMITS))
    family = families[spec.name.removesuffix("_total")]
    number = 1
    for values in spec.labels.values():
        number *= len(values)
    main = {"counter": spec.name, "gauge": spec.name}
    name = main.get(spec.kind, spec.name + "_count")
    series = [s for s in family.samples if s.name in (name, name + "_total")]
    assert {tuple(s.labels) for s in series} == {tuple(spec.labels)}
    assert len({tuple(s.labels.values()) for s in series}) == number


def test_a_value_that_the_table_does_not_list_is_a_defect() -> None:
    with pytest.raises(KeyError):
        Metrics(LIMITS).count("tgi_request_failure", err="whatever the client says")


def test_histograms() -> None:
    metrics = Metrics(LIMITS)
    for tokens in (1, 16, 17, 1024, 5000):
        metrics.observe("tgi_request_generated_tokens", tokens)
    name = "tgi_request_generated_tokens"
    assert value(metrics, f"{name}_bucket", le="16.0") == 2
    assert value(metrics, f"{name}_bucket", le="32.0") == 3
    assert value(metrics, f"{name}_bucket", le="1024.0") == 4
    assert value(metrics, f"{name}_bucket", le="+Inf") == 5
    assert value(metrics, f"{name}_count") == 5
    assert value(metrics, f"{name}_sum") == 6058


def test_lengths_without_a_limit_are_histograms_too() -> None:
    metrics = Metrics(LIMITS)
    for name in ("tgi_request_raw_input_length", "tgi_batch_next_tokens"):
        for tokens in (64, 65, 10**6):
            metrics.observe(name, tokens)
        assert value(metrics, f"{name}_bucket", le="64.0") == 1
        assert value(metrics, f"{name}_bucket", le="128.0") == 2
        assert value(metrics, f"{name}_bucket", le="524288.0") == 2
        assert value(metrics, f"{name}_count") == 3


def test_names_of_other_servers() -> None:
    plain, metrics = Metrics(LIMITS), Metrics(LIMITS, compat='a"b')
    assert b"vllm:" not in plain.render()
    metrics.set("tgi_queue_size", 4)
    metrics.set("tgi_batch_current_size", 3)
    metrics.set("tgi_kv_cache_usage", 0.25)
    metrics.count("tgi_preemption_count", 2)
    metrics.count("tgi_request_success", stop_reason="EOS_TOKEN", kind="single")
    metrics.count("tgi_request_success", stop_reason="STOP_SEQUENCE", kind="stream")
    metrics.count("tgi_request_success", stop_reason="MAX_TOKENS", kind="stream")
    metrics.observe("tgi_request_input_length", 7)
    metrics.observe("tgi_request_time_to_first_token_duration", 0.5)
    metrics.observe("tgi_request_inter_token_duration", 0.25)
    metrics.observe("tgi_request_inter_token_duration", 0.25)
    families = parsed(metrics)
    samples = {
        (s.name, s.labels.get("finished_reason")): s.value
        for family in families.values()
        for s in family.samples
        if s.name.startswith("vllm:") and s.labels["model_name"] == 'a"b'
    }
    expected = {
        "vllm:num_requests_waiting": 4,
        "vllm:num_requests_running": 3,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 2,
        "vllm:prompt_tokens_total": 7,
        "vllm:generation_tokens_total": 3,
        "vllm:time_to_first_token_seconds_sum": 0.5,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 0,
    }
    for name, number in expected.items():
        assert samples[name, None] == number, name
    assert samples["vllm:request_success_total", "stop"] == 2
    assert samples["vllm:request_success_total", "length"] == 1
    assert samples["vllm:request_success_total", "abort"] == 0
    assert {alias.name.removesuffix("_total") for alias in COMPAT} <= families.keys()


def test_the_number_of_series_has_a_bound() -> None:
    text = Metrics(Limits(131072, 4096, 4096), compat="m").render().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) <= MOST_SERIES
    assert len(lines) == len({line.rpartition(" ")[0] for line in lines})


def test_promtool_finds_fault_only_with_given_names() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool (it comes with Prometheus) to check with")
    text = Metrics(LIMITS, compat="model").render()
    command = [promtool, "check", "metrics"]
    result = subprocess.run(command, check=False, input=text, capture_output=True)
    # Fixed by those who read them: plain names of counters, "_count" in them, colons.
    given = ('should have "_total" suffix', 'should not have "_count" suffix', "not contain ':'")
    faults = [line for line in result.stderr.decode().splitlines() if not line.endswith(given)]
    assert not faults
    assert result.returncode in (0, 3)  # 3: only such faults
