"""Settings of the model: what is served, within which limits, with which memory."""

from typing import Annotated, Literal

import msgspec

from tgis.config.setting import (
    KINDS,
    PORT,
    SIZE,
    Check,
    Kind,
    Setting,
    at_least,
    between,
    choice,
)

MODEL = "Model"
LIMITS = "Limits and batching"
MEMORY = "Memory and compute"

ENGINE_GROUP = "tgis.engines"  # entry points by which other packages add engines
_ENGINES = (
    "tgis_native",
    "hf_transformers",
    "hf_accelerate",
    "hf_optimum_bt",
    "hf_optimum_ort",
    "ibm_fms",
    "ds_inference",
    "hf_custom_tp",
)


def _read_engine(text: str) -> str:
    """A known engine in any case, or one that is installed, spelt as it is."""
    name = text.strip()
    if name.lower() in _ENGINES:
        return name.lower()
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    (entry,) = {entry.name for entry in entry_points(group=ENGINE_GROUP, name=name)}
    return entry


_NO_KERNEL = "weights of few bits have one kernel on a CPU, and are dequantised on a CUDA device"
NOT_MEASURED = "memory is measured by one trial step, not by a series of them"
_DTYPES = {"auto": None, "float": "float32", "half": "float16"} | {
    name: name for name in ("float32", "float16", "bfloat16")
}
_QUANTIZE = {"none": None} | {
    name: name for name in ("gptq", "awq", "bitsandbytes", "int8", "int4", "int8-dynamic")
}


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The first part of `Config`."""

    model_name: Annotated[
        str | None,
        Setting(
            MODEL,
            "name of a model in the local Hugging Face cache, or a directory",
            aliases={"model": ""},
            unset="the small demo model that comes with the server",
        ),
    ] = None
    revision: Annotated[
        str | None,
        Setting(MODEL, "branch, tag or commit of a cached model", unset="main"),
    ] = None
    deployment_framework: Annotated[
        str | None,
        Setting(
            MODEL,
            "engine that runs the model",
            kind=Kind(
                f"one of {', '.join(_ENGINES)}, or of those that other packages have installed",
                _read_engine,
            ),
            aliases={"engine": ""},
            unset="chosen by the model's family",
        ),
    ] = None
    dtype: Annotated[
        str | None,
        Setting(
            MODEL,
            "type of the weights in memory",
            aliases={"dtype_str": "dtype and dtype_str args both provided with different values"},
            kind=choice(_DTYPES, "Unrecognized data type: {v}"),
            unset="bfloat16 where the CPU computes in it, else float32",
        ),
    ] = None
    quantize: Annotated[
        str | None,
        Setting(
            MODEL,
            "quantisation of linear weights: stored (gptq, awq), or when they are loaded (native)",
            aliases={"quantization": "Inconsistent quantize and quantization arg values"},
            kind=choice(_QUANTIZE, "Unrecognized quantization method specified: {v}"),
            unset="as the model's own files say",
        ),
    ] = None
    disable_exllama: Annotated[
        bool, Setting(MODEL, "no CUDA kernel for GPTQ weights", env_only=True, no_effect=_NO_KERNEL)
    ] = False
    exllama_version: Annotated[
        int,
        Setting(
            MODEL,
            "version of the Exllama kernel for GPTQ weights",
            kind=choice({"1": 1, "2": 2}),
            env_only=True,
            no_effect=_NO_KERNEL,
        ),
    ] = 2
    gptq_cuda_type: Annotated[
        Literal["exllama", "marlin"],
        Setting(
            MODEL,
            "CUDA kernel for GPTQ weights",
            kind=choice(
                {name: name for name in ("exllama", "marlin")}, "Invalid GPTQ_CUDA_TYPE {v}"
            ),
            env_only=True,
            no_effect=_NO_KERNEL,
        ),
    ] = "exllama"
    trust_remote_code: Annotated[
        bool, Setting(MODEL, "run Python code that comes with the model")
    ] = False
    transformers_attn_impl: Annotated[
        str | None,
        Setting(
            MODEL,
            "attn_implementation of hf engines",
            unset="Transformers' own choice",
        ),
    ] = None
    flash_attention: Annotated[bool, Setting(MODEL, "as TGIS: choose the engine tgis_native")] = (
        False
    )
    paged_attention: Annotated[bool, Setting(MODEL, "as TGIS: choose the engine tgis_native")] = (
        False
    )
    hf_hub_cache: Annotated[
        str,
        Setting(
            MODEL,
            "directory of the Hugging Face cache",
            aliases=dict.fromkeys(
                ("transformers_cache", "huggingface_hub_cache"),
                "{b} and {a} env vars can't be set to different values",
            ),
            unset="$HF_HOME/hub, else ~/.cache/huggingface/hub",
            env_only=True,
        ),
    ] = ""

    max_sequence_length: Annotated[
        int | None,
        Setting(
            LIMITS,
            "most tokens of one sequence, input and generated together",
            check=at_least(2, "max_sequence_length ({v}) must be at least 2 (1 input + 1 output)"),
            aliases={
                "max_model_len": "Inconsistent max_model_len and max_sequence_length arg values"
            },
            unset="the model's own, else 2048",
        ),
    ] = None
    max_new_tokens: Annotated[
        int,
        Setting(
            LIMITS,
            "most tokens that one request may generate",
            check=at_least(1, "max_new_tokens ({v}) at least 1"),
        ),
    ] = 1024
    max_concurrent_requests: Annotated[
        int,
        Setting(
            LIMITS,
            "inputs waiting and running together; more are refused as overload",
            check=at_least(1, "max_concurrent_requests must be > 0"),
        ),
    ] = 512
    max_batch_size: Annotated[
        int | None,
        Setting(
            LIMITS,
            "most sequences that run at once",
            check=at_least(1),
            unset="the engine's choice; 12 for padded engines",
        ),
    ] = None
    max_prefill_padding: Annotated[
        float,
        Setting(
            LIMITS,
            "most padding in a prefill batch, as a share (padded engines)",
            check=between(
                0.0,
                1.0,
                "max_prefill_padding ({v}) must be a percentage in the range [0.0, 1.0]",
            ),
        ),
    ] = 0.2
    max_waiting_tokens: Annotated[
        int,
        Setting(
            LIMITS,
            "steps that small additions to the batch may wait (padded engines)",
            check=at_least(0),
        ),
    ] = 24
    max_step_tokens: Annotated[
        int | None,
        Setting(
            LIMITS,
            "new tokens that one step computes at most",
            check=at_least(1),
            unset="the engine's choice",
        ),
    ] = None
    max_mixed_tokens: Annotated[
        int | None,
        Setting(
            LIMITS,
            "of those, tokens of prompts at most where other sequences wait for their next token",
            check=at_least(1),
            unset="what they leave of 256 tokens on a CPU, and at least 128; about 100 keeps"
            " streams even when many prompts come",
        ),
    ] = None
    prefix_caching: Annotated[
        bool,
        Setting(
            LIMITS,
            "keep computed prompts and reuse their beginnings",
        ),
    ] = True

    device: Annotated[
        Literal["cpu", "cuda"] | None,
        Setting(
            MEMORY,
            "what computes the model, in the native engine",
            unset="cpu, also beside a CUDA device: that path has not been run yet",
        ),
    ] = None
    kv_layout: Annotated[
        Literal["rows", "blocks"] | None,
        Setting(
            MEMORY,
            "how the native engine lays its cache out: blocks share prefixes, rows are faster on"
            " a CPU",
            unset="rows on a CPU, blocks on a CUDA device",
        ),
    ] = None
    attention: Annotated[
        Literal["varlen", "flash_attn", "flashinfer", "triton", "flex", "reference"] | None,
        Setting(
            MEMORY,
            "what attends over blocks in the native engine",
            unset="the first of them that is installed and serves the model; reference on a CPU",
        ),
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        Setting(
            MEMORY,
            "bytes for keys and values, of all processes on this machine",
            kind=SIZE,
            check=Check("at least 1MB, such as 4GiB or 512MiB", lambda v: 10**6 <= v < 2**50),
            unset="a share of the memory that is available",
        ),
    ] = None
    threads: Annotated[
        int | None,
        Setting(
            MEMORY,
            "threads that compute the model, in each process of it",
            check=between(1, 4096, noun="an integer"),
            unset="one for each core that the process may use, divided among num_shard",
        ),
    ] = None
    tokenization_workers: Annotated[
        int | None,
        Setting(
            MEMORY,
            "threads that tokenize",
            check=Check(
                "an integer from 1 to 256",
                lambda v: 1 <= v <= 256,
                "tokenization_workers must be > 0",
            ),
            unset="one for each core beyond the shards, 1 to 8",
        ),
    ] = None
    num_shard: Annotated[
        int,
        Setting(
            MEMORY,
            "processes that the model is split over",
            kind=KINDS[int]._replace(text="NUM_GPUS must be a positive integer"),
            check=at_least(1, "`num_shard` / NUM_GPUS cannot be < 1"),
            aliases={
                "num_gpus": "NUM_GPUS and num_shard are set to different values ({vb} and {va})",
                "tensor_parallel_size": "Inconsistent tensor_parallel_size and num_gpus/num_shard"
                " arg values",
            },
        ),
    ] = 1
    master_addr: Annotated[
        str,
        Setting(MEMORY, "address of this server's first process, where the others meet it"),
    ] = "localhost"
    master_port: Annotated[
        int,
        Setting(
            MEMORY,
            "port where the processes meet (any, if not given); with WORLD_SIZE the one above it",
            check=PORT,
        ),
    ] = 29500
    rank: Annotated[
        int,
        Setting(
            MEMORY,
            "which of WORLD_SIZE processes this one is, as torchrun sets it",
            check=at_least(0),
            env_only=True,
        ),
    ] = 0
    world_size: Annotated[
        int,
        Setting(
            MEMORY,
            "processes of the model, if each is started by itself, as torchrun does",
            check=at_least(1),
            env_only=True,
        ),
    ] = 1
    local_world_size: Annotated[
        int,
        Setting(
            MEMORY,
            "of WORLD_SIZE processes, those on this machine, as torchrun sets it",
            check=at_least(1),
            env_only=True,
        ),
    ] = 1
    estimate_memory: Annotated[
        Literal["auto", "manual", "off"],
        Setting(
            MEMORY,
            "how the memory of a batch is estimated (padded engines)",
            kind=choice(
                {name: name for name in ("auto", "manual", "off")},
                "valid options for ESTIMATE_MEMORY are auto, manual, and off",
            ),
        ),
    ] = "auto"
    batch_safety_margin: Annotated[
        int,
        Setting(
            MEMORY,
            "percent of the estimated memory kept back (padded engines, and on CUDA devices)",
            check=between(0, 99, noun="a percentage"),
        ),
    ] = 20
    cuda_process_memory_fraction: Annotated[
        float,
        Setting(
            MEMORY,
            "share of a CUDA device's memory that the process may use",
            short="c",
            check=Check(
                "a number above 0 and up to 1",
                lambda v: 0 < v <= 1,
                "cuda_process_memory_fraction must be in range 0 < x <= 1",
            ),
        ),
    ] = 1.0
    pytorch_cuda_alloc_conf: Annotated[
        str | None,
        Setting(
            MEMORY,
            "settings of PyTorch's allocator on CUDA devices, which reads them itself",
            unset="expandable_segments:True",
            env_only=True,
        ),
    ] = None
    pt2_compile: Annotated[
        bool,
        Setting(
            MEMORY, "compile the model with PyTorch's compiler before it is served (tgis_native)"
        ),
    ] = False
    pt2_compile_cache: Annotated[
        str | None,
        Setting(
            MEMORY,
            "directory in which compiled code is kept between starts",
            unset="~/.cache/tgis/compiled",
        ),
    ] = None
