"""Settings that are accepted and change nothing, or refused, each with the reason that is given."""

from typing import NamedTuple

from tgis.config.model import NOT_MEASURED

_NO_SPECULATOR = (
    "MLP speculators are not served; --speculate takes prompt-lookup or a small model instead"
)
_ONNX_TOOL = "ONNX files are made by `text-generation-server convert-to-onnx`, which has an option"


class Ignored(NamedTuple):
    """A setting that is accepted and changes nothing, or refused if it is given."""

    annotation: type
    why: str = ""
    env_only: bool = True
    refused: bool = False


IGNORED: dict[str, Ignored] = {
    "max_batch_weight": Ignored(str),
    "max_prefill_weight": Ignored(str),
    "master_shard_uds_path": Ignored(str, "there is no separate router", env_only=False),
    "tokenizer_path": Ignored(str, "the tokenizer is the model's", env_only=False),
    "enable_vllm_log_requests": Ignored(bool, "requests are always logged", env_only=False),
    "disable_prompt_logprobs": Ignored(
        bool, "details of input tokens cost nothing unless a request asks for them", env_only=False
    ),
    "max_logprobs": Ignored(int, "up to 10 alternatives are always offered", env_only=False),
    "cuda_pad_to_mult_of_8": Ignored(bool, "inputs are not padded"),
    "bloom_slow_but_exact": Ignored(bool, "results never depend on the batch"),
    "disable_custom_kernels": Ignored(bool, "there are none that can be turned off"),
    "merge_onnx_graphs": Ignored(bool, _ONNX_TOOL),
    "optimize_onnx_model": Ignored(bool, _ONNX_TOOL),
    "compact_before_prefill": Ignored(bool, "there is nothing to compact"),
    "fp32_logits_process": Ignored(bool, "logits are always processed in float32"),
    "kv_cache_manager_num_gpu_blocks": Ignored(int, "kv_cache_memory sizes the cache"),
    "estimate_memory_batch_size": Ignored(int, NOT_MEASURED),
    "estimate_memory_min_samples": Ignored(int, NOT_MEASURED),
    "estimate_memory_start_seq_len": Ignored(int, NOT_MEASURED),
    "estimate_memory_stop_seq_len": Ignored(int, NOT_MEASURED),
    "estimate_memory_fit_threshold": Ignored(float, NOT_MEASURED),
    "estimate_memory_new_tokens": Ignored(int, NOT_MEASURED),
    "estimate_memory_new_token_samples": Ignored(int, NOT_MEASURED),
    "speculator_name": Ignored(str, _NO_SPECULATOR, env_only=False, refused=True),
    "speculator_revision": Ignored(str, _NO_SPECULATOR, refused=True),
    "speculator_n_candidates": Ignored(int, _NO_SPECULATOR, env_only=False, refused=True),
    "speculator_top_k_tokens_per_head": Ignored(str, _NO_SPECULATOR, refused=True),
    "log_gpu_usage_interval": Ignored(float, "metrics tell how much of the cache is used"),
    "debug": Ignored(str, "log_level sets what is logged"),
    "git_commit_hash": Ignored(str, "the version says what runs"),
    "hf_hub_offline": Ignored(bool, "nothing is ever downloaded while serving"),
}
