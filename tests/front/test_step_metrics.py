"""What the core says of a step becomes the batch and queue metrics."""

from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tgis.front.streams import Streams
from tgis.observe.metrics import Limits, Metrics
from tgis.wire import Gauges, Out, SchedulerCounts, StepStats

STEP = StepStats(
    duration=0.5,
    forward_duration=0.4,
    tokens_duration=0.05,
    num_prefill_seqs=0,
    num_prefill_tokens=0,
    num_decode_seqs=3,
    num_joined=0,
    num_calls=1,
    num_errors=0,
    num_out_of_memory=0,
    counts=SchedulerCounts(),
)


def seen(*outs: Out) -> dict[str, float]:
    """All samples that are not 0 after these messages."""
    metrics = Metrics(Limits(max_sequence_length=64, max_new_tokens=64, max_batch_size=8))
    streams = Streams(None, metrics)  # type: ignore[arg-type]
    for out in outs:
        streams.on_out(out)
    return {
        sample.name + "".join(f",{value}" for key, value in sample.labels.items() if key != "le"): (
            sample.value
        )
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.value and not sample.name.endswith("_bucket")
    }


def out(gauges: Gauges | None = None, **changes: Any) -> Out:
    return Out([], [], [], msgspec.structs.replace(STEP, **changes), gauges or Gauges())


def test_a_decoding_step() -> None:
    samples = seen(out())
    assert samples["tgi_batch_inference_count_total,next_token"] == 1
    assert samples["tgi_batch_inference_success_total,next_token"] == 1
    assert samples["tgi_batch_inference_batch_size_sum,next_token"] == 3
    for name, seconds in (("", 0.5), ("forward_", 0.4), ("tokproc_", 0.05)):
        metric = f"tgi_batch_inference_{name}duration"
        assert samples[f"{metric}_sum,next_token,single_only"] == seconds
    assert not any("prefill" in name or "concatenation" in name for name in samples)


def test_prompts_that_join() -> None:
    changes = {"num_prefill_seqs": 2, "num_prefill_tokens": 70, "num_joined": 2}
    samples = seen(out(**changes), out(**changes), out())
    assert samples["tgi_batch_inference_count_total,prefill"] == 2
    assert samples["tgi_batch_inference_batch_size_sum,prefill"] == 4
    assert samples["tgi_batch_next_tokens_sum"] == 140
    assert samples["tgi_batch_next_tokens_count"] == 2
    assert samples["tgi_batch_concatenation_count_total"] == 2


def test_failed_calls() -> None:
    samples = seen(out(num_calls=5, num_errors=2, num_out_of_memory=1), out(num_errors=1))
    assert samples["tgi_batch_inference_count_total,next_token"] == 6
    assert samples["tgi_batch_inference_success_total,next_token"] == 2
    assert samples["tgi_batch_inference_failure_total,next_token,error"] == 3
    assert samples["tgi_batch_inference_failure_total,next_token,oom"] == 1
    assert samples["tgi_batch_inference_duration_count,next_token,single_only"] == 1


@pytest.mark.parametrize(
    ("count", "metric"),
    [
        ("num_preempted", "tgi_preemption_count"),
        ("num_queue_jumps", "tgi_queue_jump"),
        ("num_exact_fits", "tgi_granular_batch_addition"),
        ("num_weight_skips", "tgi_prefill_weight_limit_exceeded"),
        ("num_padding_skips", "tgi_prefill_padding_limit_exceeded"),
        ("prefix_query_tokens", "tgi_prefix_cache_query_tokens"),
        ("prefix_hit_tokens", "tgi_prefix_cache_hit_tokens"),
    ],
)
def test_counts(count: str, metric: str) -> None:
    samples = seen(*[out(counts=SchedulerCounts(**{count: number})) for number in (3, 4)])
    assert samples[metric + "_total"] == 7
    others = [name for name in samples if not name.startswith(("tgi_batch", metric, "tgi_health"))]
    assert not others


def test_gauges_of_every_message() -> None:
    gauges = Gauges(
        num_waiting=4,
        num_running=2,
        running_tokens=50,
        remaining_tokens=30,
        kv_tokens_used=25,
        kv_tokens_total=100,
    )
    samples = seen(Out([], [], [], None, gauges))
    assert samples["tgi_queue_size"] == 4
    assert samples["tgi_batch_current_size"] == 2
    assert samples["tgi_batch_input_tokens"] == 50
    assert samples["tgi_batch_max_remaining_tokens"] == 30
    assert samples["tgi_kv_cache_usage"] == 0.25
    assert not any("inference" in name for name in samples)
