"""Every metric, declared once: name, kind, meaning, labels and all values that these may take.

Names, labels and buckets are those that TGIS documents; what is ours stands at the end of a group.
Values of labels are listed, so that each series exists from the start and their number has a bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "duration", "text_length", "sequence", "new_tokens", "batch"]
Labels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Spec:
    """One row. Kinds other than counter and gauge are histograms with those buckets."""

    name: str
    kind: Kind
    help: str
    labels: Labels = field(default_factory=dict)


KIND: Labels = {"kind": ("single", "batch", "stream")}
ERR: Labels = {
    "err": (
        "conc_limit",
        "validation",
        "queue_full",
        "generate",
        "unknown",
        "cancelled",
        "timeout",
    )
}
STOP_REASON: Labels = {
    "stop_reason": ("MAX_TOKENS", "EOS_TOKEN", "TIME_LIMIT", "STOP_SEQUENCE", "TOKEN_LIMIT")
}
METHOD: Labels = {"method": ("prefill", "next_token")}
REASON: Labels = {"reason": ("oom", "connection", "error")}
MAKEUP: Labels = {"makeup": ("single_only",)}
WHEN: Labels = {"when": ("startup", "serving")}
STATE: Labels = {"state": ("starting", "ready", "degraded", "dead", "draining")}

TABLE: tuple[Spec, ...] = (
    # Requests
    Spec("tgi_request_count", "counter", "Requests received", KIND),
    Spec("tgi_request_input_count", "counter", "Inputs received"),
    Spec("tgi_request_failure", "counter", "Requests failed", ERR),
    Spec("tgi_request_success", "counter", "Inputs completed", {**STOP_REASON, **KIND}),
    Spec("tgi_request_max_new_tokens", "new_tokens", "Limit on generated tokens asked for"),
    Spec("tgi_request_input_length", "sequence", "Input tokens after truncation"),
    Spec("tgi_request_raw_input_length", "text_length", "Input tokens before truncation"),
    Spec("tgi_request_validation_duration", "duration", "Seconds from arrival to a valid request"),
    Spec("tgi_request_queue_duration", "duration", "Seconds an input waited for its batch"),
    Spec("tgi_request_mean_time_per_token_duration", "duration", "Inference seconds per token"),
    Spec("tgi_request_inference_duration", "duration", "Seconds from batch to last token"),
    Spec("tgi_request_duration", "duration", "Seconds from arrival to last token"),
    Spec("tgi_request_generated_tokens", "new_tokens", "Generated tokens per input"),
    Spec("tgi_request_total_tokens", "sequence", "Input and generated tokens per input"),
    Spec("tgi_request_time_to_first_token_duration", "duration", "Seconds to the first token"),
    Spec("tgi_request_inter_token_duration", "duration", "Seconds between tokens of an input"),
    # Soft prompts and LoRA
    Spec("tgi_prompt_load_failure", "counter", "Soft prompts that could not be loaded"),
    Spec("tgi_prompt_load_duration", "duration", "Seconds to load a soft prompt"),
    Spec("tgi_lora_load_failure", "counter", "LoRA adapters that could not be loaded"),
    Spec("tgi_lora_load_duration", "duration", "Seconds to load a LoRA adapter"),
    # Tokenize
    Spec("tgi_tokenize_request_count", "counter", "Tokenize calls"),
    Spec("tgi_tokenize_request_input_count", "counter", "Texts of Tokenize calls"),
    Spec("tgi_tokenize_request_tokens", "text_length", "Tokens per Tokenize call"),
    Spec("tgi_tokenize_request_duration", "duration", "Seconds per Tokenize call"),
    # Batch and queue
    Spec("tgi_queue_size", "gauge", "Inputs waiting"),
    Spec("tgi_queue_jump", "counter", "Inputs that passed one that did not fit"),
    Spec("tgi_granular_batch_addition", "counter", "Inputs that only the exact check let in"),
    Spec("tgi_prefill_weight_limit_exceeded", "counter", "Inputs put off for prefill weight"),
    Spec("tgi_prefill_padding_limit_exceeded", "counter", "Inputs put off for prefill padding"),
    Spec("tgi_batch_current_size", "gauge", "Sequences in the batch"),
    Spec("tgi_batch_input_tokens", "gauge", "Tokens in the batch"),
    Spec(
        "tgi_batch_max_remaining_tokens", "gauge", "Most tokens that one of the batch may generate"
    ),
    Spec("tgi_batch_next_tokens", "text_length", "Prompt tokens of a step"),
    Spec("tgi_batch_concatenation_count", "counter", "Prompts that joined a running batch"),
    Spec("tgi_batch_inference_count", "counter", "Steps begun", METHOD),
    Spec("tgi_batch_inference_success", "counter", "Steps completed", METHOD),
    Spec("tgi_batch_inference_failure", "counter", "Steps failed", {**METHOD, **REASON}),
    Spec("tgi_batch_inference_batch_size", "batch", "Sequences per step", METHOD),
    Spec("tgi_batch_inference_duration", "duration", "Seconds per step", {**METHOD, **MAKEUP}),
    Spec(
        "tgi_batch_inference_forward_duration",
        "duration",
        "Seconds of a step in the engine",
        {**METHOD, **MAKEUP},
    ),
    Spec(
        "tgi_batch_inference_tokproc_duration",
        "duration",
        "Seconds of a step after the engine",
        {**METHOD, **MAKEUP},
    ),
    Spec("tgi_kv_cache_usage", "gauge", "Share of key/value memory in use, 0 to 1"),
    Spec("tgi_preemption_count", "counter", "Sequences that gave their memory up to be recomputed"),
    Spec("tgi_prefix_cache_query_tokens", "counter", "Prompt tokens looked up in the cache"),
    Spec("tgi_prefix_cache_hit_tokens", "counter", "Prompt tokens found in the cache"),
    Spec("tgi_speculation_draft_count", "counter", "Drafts of several tokens that were computed"),
    Spec("tgi_speculation_draft_tokens", "counter", "Tokens of these drafts"),
    Spec("tgi_speculation_accepted_tokens", "counter", "Drafted tokens that were then chosen"),
    # The server
    Spec("tgi_health_state", "gauge", "1 for the state that the server is in", STATE),
    Spec("tgi_model_load_ratio", "gauge", "Share of the weights that has been read, 0 to 1"),
    Spec("tgi_compile_count", "counter", "Graphs that were compiled", WHEN),
    Spec("tgi_compile_active", "gauge", "1 if compiled code computes the steps (PT2_COMPILE)"),
    Spec(
        "tgi_compile_warmup_seconds",
        "gauge",
        "Seconds that compiling and warming up took when the core started",
    ),
    Spec("tgi_core_lost_count", "counter", "Times that the core's process was lost"),
    Spec(
        "tgi_credentials_reload_count",
        "counter",
        "Changes of certificates and keys on disk that were seen",
        {"file": ("tls", "api_keys"), "result": ("success", "failure")},
    ),
    Spec(
        "tgi_tls_certificate_expiry_seconds",
        "gauge",
        "Unix time at which the certificate in use expires; 0 without TLS",
    ),
    Spec(
        "tgi_auth_failure",
        "counter",
        "Calls refused for want of permission",
        {"reason": ("no_key", "wrong_key", "client_name")},
    ),
)


@dataclass(frozen=True, slots=True)
class Alias:
    """One of our metrics under a name that tools of other servers read.

    A histogram is shown whole. A counter or gauge is the sum of the `sources`, which are names of
    samples; `where` restricts those to some values of a label.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    sources: tuple[str, ...]
    where: Labels = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


def _success(reason: str, *stop_reasons: str) -> Alias:
    return Alias(
        "vllm:request_success_total",
        "counter",
        ("tgi_request_success_total",),
        {"stop_reason": stop_reasons},
        {"finished_reason": reason},
    )


def _histogram(name: str, source: str) -> Alias:
    return Alias(name, "histogram", (source,))


# Rows of one name stand together, as the exposition format wants them.
COMPAT: tuple[Alias, ...] = (
    Alias("vllm:num_requests_running", "gauge", ("tgi_batch_current_size",)),
    Alias("vllm:num_requests_waiting", "gauge", ("tgi_queue_size",)),
    Alias("vllm:kv_cache_usage_perc", "gauge", ("tgi_kv_cache_usage",)),
    Alias("vllm:gpu_cache_usage_perc", "gauge", ("tgi_kv_cache_usage",)),
    Alias("vllm:num_preemptions_total", "counter", ("tgi_preemption_count_total",)),
    Alias("vllm:prompt_tokens_total", "counter", ("tgi_request_input_length_sum",)),
    Alias(
        "vllm:generation_tokens_total",
        "counter",
        # One observation for each token, as it comes.
        (
            "tgi_request_time_to_first_token_duration_count",
            "tgi_request_inter_token_duration_count",
        ),
    ),
    Alias("vllm:spec_decode_num_drafts_total", "counter", ("tgi_speculation_draft_count_total",)),
    Alias(
        "vllm:spec_decode_num_draft_tokens_total",
        "counter",
        ("tgi_speculation_draft_tokens_total",),
    ),
    Alias(
        "vllm:spec_decode_num_accepted_tokens_total",
        "counter",
        ("tgi_speculation_accepted_tokens_total",),
    ),
    _success("stop", "EOS_TOKEN", "STOP_SEQUENCE"),
    _success("length", "MAX_TOKENS", "TOKEN_LIMIT"),
    _success("abort", "TIME_LIMIT"),
    _histogram("vllm:time_to_first_token_seconds", "tgi_request_time_to_first_token_duration"),
    _histogram("vllm:inter_token_latency_seconds", "tgi_request_inter_token_duration"),
    _histogram("vllm:time_per_output_token_seconds", "tgi_request_inter_token_duration"),
    _histogram("vllm:e2e_request_latency_seconds", "tgi_request_duration"),
    _histogram("vllm:request_queue_time_seconds", "tgi_request_queue_duration"),
    _histogram("vllm:request_inference_time_seconds", "tgi_request_inference_duration"),
    _histogram("vllm:request_prompt_tokens", "tgi_request_input_length"),
    _histogram("vllm:request_generation_tokens", "tgi_request_generated_tokens"),
    _histogram("vllm:request_params_max_tokens", "tgi_request_max_new_tokens"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits that histogram buckets are made of."""

    max_sequence_length: int
    max_new_tokens: int
    max_batch_size: int


_MOST_BATCH_BUCKETS = 64


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
            step = -(-limits.max_batch_size // _MOST_BATCH_BUCKETS)
            return [float(size) for size in range(step, limits.max_batch_size + step, step)]
        case _:
            raise ValueError(f"{kind} has no buckets")
