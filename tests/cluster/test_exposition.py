"""Pages of metrics of several replicas as one."""

from prometheus_client.parser import text_string_to_metric_families

from tgis.cluster.exposition import merge
from tgis.observe.metrics import Limits, Metrics


def page(requests: int) -> str:
    metrics = Metrics(Limits(100, 50, 8))
    metrics.count("tgi_request_count", requests, kind="single")
    metrics.observe("tgi_request_input_length", 7)
    return metrics.render().decode()


def test_every_sample_is_there_with_its_replica() -> None:
    one, two = page(1), page(2)
    merged = merge({"a": one, "b": two})
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
    }
    for replica, text in (("a", one), ("b", two)):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = sample.labels | {"replica": replica}
                assert samples[(sample.name, *sorted(labels.items()))] == sample.value
    assert merged.count("# TYPE tgi_request_count counter") == 1
    lines = [line for line in merged.splitlines() if line and not line.startswith("#")]
    assert (
        len(lines)
        == len(set(lines))
        == 2 * sum(bool(line) and not line.startswith("#") for line in one.splitlines())
    )


def test_values_with_braces_and_spaces_stay_whole() -> None:
    text = '# HELP m help {x}\n# TYPE m gauge\nm{a="b {c} d"} 1.0\nn 2.0\n'
    assert merge({"r": text}).splitlines()[2:] == [
        'm{replica="r",a="b {c} d"} 1.0',
        'n{replica="r"} 2.0',
    ]


def test_nothing_of_nobody() -> None:
    assert merge({}) == ""
