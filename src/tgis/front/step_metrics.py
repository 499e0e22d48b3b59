"""What the core says of its steps, as metrics."""

from tgis.observe.metrics import Metrics
from tgis.wire import DraftCounts, Gauges, SchedulerCounts, StepStats


def note_gauges(metrics: Metrics, gauges: Gauges) -> None:
    """Show the state of queue and batch."""
    metrics.set("tgi_batch_current_size", gauges.num_running)
    metrics.set("tgi_batch_input_tokens", gauges.running_tokens)
    metrics.set("tgi_batch_max_remaining_tokens", gauges.remaining_tokens)
    metrics.set("tgi_queue_size", gauges.num_waiting)
    used = gauges.kv_tokens_used / gauges.kv_tokens_total if gauges.kv_tokens_total else 0.0
    metrics.set("tgi_kv_cache_usage", used)


def note_step(metrics: Metrics, step: StepStats) -> None:
    """One step of the engine, and what the scheduler counted meanwhile."""
    _note_engine(metrics, step)
    _note_counts(metrics, step.counts, step.drafts)
    if step.num_compiled:
        metrics.count("tgi_compile_count", step.num_compiled, when="serving")


def _note_engine(metrics: Metrics, step: StepStats) -> None:
    """A step with prompts is a prefill, though others may have advanced in it too."""
    method = "prefill" if step.num_prefill_seqs else "next_token"
    failures = {"error": step.num_errors, "oom": step.num_out_of_memory}
    succeeded = step.num_calls - sum(failures.values())
    metrics.count("tgi_batch_inference_count", step.num_calls, method=method)
    for reason, number in failures.items():
        if number:
            metrics.count("tgi_batch_inference_failure", number, method=method, reason=reason)
    size = step.num_prefill_seqs or step.num_decode_seqs
    metrics.observe("tgi_batch_inference_batch_size", size, method=method)
    if step.num_prefill_tokens:
        metrics.observe("tgi_batch_next_tokens", step.num_prefill_tokens)
    if step.num_joined:
        metrics.count("tgi_batch_concatenation_count")
    if not succeeded:
        return
    metrics.count("tgi_batch_inference_success", succeeded, method=method)
    for name, seconds in (
        ("tgi_batch_inference_duration", step.duration),
        ("tgi_batch_inference_forward_duration", step.forward_duration),
        ("tgi_batch_inference_tokproc_duration", step.tokens_duration),
    ):
        metrics.observe(name, seconds, method=method, makeup="single_only")


def _note_counts(metrics: Metrics, counts: SchedulerCounts, drafts: DraftCounts) -> None:
    for name, number in (
        ("tgi_preemption_count", counts.num_preempted),
        ("tgi_queue_jump", counts.num_queue_jumps),
        ("tgi_granular_batch_addition", counts.num_exact_fits),
        ("tgi_prefill_weight_limit_exceeded", counts.num_weight_skips),
        ("tgi_prefill_padding_limit_exceeded", counts.num_padding_skips),
        ("tgi_prefix_cache_query_tokens", counts.prefix_query_tokens),
        ("tgi_prefix_cache_hit_tokens", counts.prefix_hit_tokens),
        ("tgi_speculation_draft_count", drafts.num_drafts),
        ("tgi_speculation_draft_tokens", drafts.num_drafted),
        ("tgi_speculation_accepted_tokens", drafts.num_accepted),
    ):
        if number:
            metrics.count(name, number)
