"""Wrong configurations, and what the one line about each must contain."""

from typing import NamedTuple


class Wrong(NamedTuple):
    """`args` and `env` as given; every one of `says` is in the message."""

    args: str
    env: dict[str, str]
    says: tuple[str, ...]


def flag(args: str, *says: str) -> Wrong:
    return Wrong(args, {}, says)


def env(variable: str, value: str, *says: str) -> Wrong:
    return Wrong("", {variable: value}, (f"(environment variable {variable})", *says))


def only_env(variable: str, value: str, *says: str) -> Wrong:
    return Wrong("", {variable: value}, (f"{variable}={value}", *says))


WRONG = [
    # Names that are not settings
    flag("--max-new-token 5", "--max-new-token: unknown", "did you mean --max-new-tokens?"),
    flag("--grpcport 1", "--grpcport: unknown", "did you mean --grpc-port?"),
    flag("--qwxz 1", "--qwxz: unknown", "--help lists all settings"),
    flag("--max-new-tokenz=5", "--max-new-tokenz: unknown", "did you mean --max-new-tokens?"),
    flag("-x 5", "-x: unknown setting"),
    flag("-- model", "--: unknown setting"),
    flag("--hf-hub-cache /x", "--hf-hub-cache: unknown setting"),
    # Values that are missing or too many
    flag("--port", "--port: has no value", "expected a port number from 0 to 65535"),
    flag("--port --grpc-port 1", "--port: has no value"),
    flag("--revision=", "--revision=''", "expected printable text"),
    flag("--port 1 --port 2", "--port=2: already given as 1; give it once"),
    flag("a b", "--model-name=b: already given as a"),
    flag("a --model-name b", "--model-name=b: already given as a"),
    flag("--no-prefix-caching=false", "--no-prefix-caching: takes no value", "--prefix-caching="),
    # Numbers
    flag("--port abc", "--port=abc: not valid; expected a port number from 0 to 65535"),
    flag("--port 99999", "--port=99999", "expected a port number from 0 to 65535"),
    flag("-p -1", "-p=-1", "a port number from 0 to 65535"),
    flag("-g65536", "-g=65536", "a port number from 0 to 65535"),
    env("GRPC_PORT", "tcp://10.0.0.1:8033", "--grpc-port=tcp://10.0.0.1:8033", "a port number"),
    env("PORT", "3000.0", "--port=3000.0", "a port number"),
    flag("--master-port 70000", "--master-port=70000", "from 0 to 65535"),
    flag("--max-new-tokens 0", "=0: max_new_tokens (0) at least 1; expected an integer from 1"),
    env("MAX_NEW_TOKENS", "many", "--max-new-tokens=many", "an integer from 1"),
    env("MAX_NEW_TOKENS", "1e3", "--max-new-tokens=1e3", "an integer from 1"),
    flag("--max-new-tokens 1_000", "--max-new-tokens=1_000", "an integer from 1"),
    flag("--max-new-tokens ²", "--max-new-tokens=²", "an integer from 1"),
    flag("--max-new-tokens 99999999999", "--max-new-tokens=99999999999", "to 2147483647"),
    flag(
        "--max-sequence-length 1",
        "max_sequence_length (1) must be at least 2 (1 input + 1 output)",
        "expected an integer from 2",
    ),
    flag("--max-concurrent-requests 0", "=0: max_concurrent_requests must be > 0", "integer from"),
    env("MAX_CONCURRENT_REQUESTS", "-5", "=-5", "max_concurrent_requests must be > 0"),
    flag("--max-batch-size 0", "--max-batch-size=0", "an integer from 1"),
    flag("--max-step-tokens 0", "--max-step-tokens=0", "an integer from 1"),
    flag("--max-waiting-tokens -1", "--max-waiting-tokens=-1", "an integer from 0"),
    flag(
        "--max-prefill-padding 1.5",
        "max_prefill_padding (1.5) must be a percentage in the range [0.0, 1.0]",
        "expected a number from 0.0 to 1.0",
    ),
    flag("--max-prefill-padding nan", "--max-prefill-padding=nan", "a number from 0.0 to 1.0"),
    flag("--batch-safety-margin 100", "--batch-safety-margin=100", "a percentage from 0 to 99"),
    flag(
        "--cuda-process-memory-fraction 0",
        "cuda_process_memory_fraction must be in range 0 < x <= 1",
        "expected a number above 0 and up to 1",
    ),
    flag("-c 1.01", "-c=1.01", "cuda_process_memory_fraction must be in range 0 < x <= 1"),
    env("TOKENIZATION_WORKERS", "0", "tokenization_workers must be > 0", "an integer from 1"),
    flag("--threads 0", "--threads=0", "an integer from 1 to 4096"),
    flag("--num-shard 0", "=0: `num_shard` / NUM_GPUS cannot be < 1", "expected an integer from 1"),
    env("NUM_GPUS", "two", "--num-shard=two", "NUM_GPUS must be a positive integer"),
    flag("--prompt-cache-size-mb -1", "--prompt-cache-size-mb=-1", "an integer from 0"),
    env("MAX_PROMPT_PREFIX_LENGTH", "x", "Invalid value for MAX_PROMPT_PREFIX_LENGTH", "=x"),
    flag("--hang-timeout 0", "--hang-timeout=0", "a number of seconds from 1 to 86400"),
    flag("--max-step-seconds 0.5", "--max-step-seconds=0.5", "a number of seconds from 1 to 86400"),
    flag("--drain-timeout forever", "--drain-timeout=forever", "a number of seconds from 0"),
    flag("--write-timeout -3", "--write-timeout=-3", "a number of seconds from 0.1"),
    # Sizes
    flag("--kv-cache-memory 4XB", "--kv-cache-memory=4XB", "such as 4GiB or 512MiB"),
    flag("--kv-cache-memory 12", "--kv-cache-memory=12", "at least 1MB"),
    flag("--max-message-bytes 2GiB", "--max-message-bytes=2GiB", "from 1KiB to 1GiB"),
    # Booleans
    flag("--json-output=maybe", "--json-output=maybe", "true or false"),
    env("JSON_OUTPUT", "on", "--json-output=on", "true or false"),
    env("DEFAULT_INCLUDE_STOP_SEQS", "2", "--default-include-stop-seqs=2", "true or false"),
    # Words
    flag("--dtype float31", "--dtype=float31: Unrecognized data type: float31", "one of auto"),
    env("DTYPE_STR", "int8", "Unrecognized data type: int8", "--dtype=int8", "float32"),
    flag("--quantize exl2", "Unrecognized quantization method specified: exl2", "one of none"),
    flag("--engine vllm", "--engine=vllm", "one of tgis_native, hf_transformers"),
    env(
        "ESTIMATE_MEMORY",
        "perhaps",
        "valid options for ESTIMATE_MEMORY are auto, manual, and off",
        "one of auto, manual, off",
    ),
    env("LOG_LEVEL", "loud", "--log-level=loud", "one of trace, debug, info"),
    env("LOG_LEVEL", "tower=warn", "--log-level=tower=warn", "one of trace, debug, info"),
    flag("--log-format xml", "--log-format=xml", "one of text, json"),
    flag("--host 0.0.0.0:3000", "--host=0.0.0.0:3000", "an IP address, without a port"),
    flag("--host http://x", "--host=http://x", "a host name"),
    flag("--otlp-endpoint localhost:4317", "--otlp-endpoint=localhost:4317", "http://localhost"),
    only_env("EXLLAMA_VERSION", "3", "one of 1, 2"),
    only_env("GPTQ_CUDA_TYPE", "triton", "Invalid GPTQ_CUDA_TYPE triton", "one of exllama, marlin"),
    only_env("BLOOM_SLOW_BUT_EXACT", "slowly", "true or false"),
    env("MODEL_NAME", "a\nb", r"--model-name='a\nb'", "printable text"),
    env("MODEL_NAME", "\udcff", r"'\udcff'", "printable text"),
    # Files
    flag("--tls-cert-path /no/cert", "couldn't load cert from /no/cert", "a readable file"),
    env("TLS_KEY_PATH", "/no/key", "couldn't load key from /no/key", "--tls-key-path=/no/key"),
    flag("--tls-client-ca-cert-path /", "couldn't load client ca cert from /", "a readable file"),
    # Contradictions
    flag(
        "--dtype float32 --dtype-str float16",
        "dtype and dtype_str args both provided with different values",
        "--dtype=float32 and --dtype-str=float16",
        "set one of them",
    ),
    Wrong(
        "--num-shard 2",
        {"NUM_GPUS": "4"},
        ("NUM_GPUS and num_shard are set to different values (4 and 2)", "--num-shard=2"),
    ),
    flag(
        "--num-gpus 2 --tensor-parallel-size 4",
        "Inconsistent tensor_parallel_size and num_gpus/num_shard arg values",
        "--num-gpus=2 and --tensor-parallel-size=4",
    ),
    Wrong(
        "--max-sequence-length 10",
        {"MAX_MODEL_LEN": "20"},
        ("Inconsistent max_model_len and max_sequence_length arg values", "MAX_MODEL_LEN"),
    ),
    Wrong("a --model b", {}, ("--model-name=a and --model=b: set to different values",)),
    Wrong(
        "",
        {"HF_HUB_CACHE": "/a", "TRANSFORMERS_CACHE": "/b"},
        ("TRANSFORMERS_CACHE and HF_HUB_CACHE env vars can't be set to different values", "=/b"),
    ),
    Wrong(
        "",
        {"TRANSFORMERS_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b"},
        (
            "HUGGINGFACE_HUB_CACHE and TRANSFORMERS_CACHE env vars can't be set to different",
            "HUGGINGFACE_HUB_CACHE=/b",
        ),
    ),
    flag("--log-format text --json-output", "--json-output", "--log-format", "set one of them"),
    Wrong("", {"WORLD_SIZE": "2"}, ("WORLD_SIZE=2: set RANK too",)),
    Wrong("", {"WORLD_SIZE": "2", "RANK": "2"}, ("RANK=2: at most 1 with WORLD_SIZE=2",)),
    Wrong("", {"RANK": "1"}, ("RANK=1: at most 0 with WORLD_SIZE=1",)),
    Wrong("", {"LOCAL_WORLD_SIZE": "2"}, ("LOCAL_WORLD_SIZE=2: at most 1",)),
    Wrong(
        "--num-shard 4",
        {"WORLD_SIZE": "2", "RANK": "0"},
        ("--num-shard=4 and WORLD_SIZE=2", "contradict each other"),
    ),
    Wrong(
        "--master-port 65535",
        {"WORLD_SIZE": "2", "RANK": "0"},
        ("--master-port=65535", "the port above it"),
    ),
    flag("--port 5000 --grpc-port 5000", "--port=5000 and --grpc-port=5000", "choose another"),
    env("PORT", "8033", "--port=8033 (", " and --grpc-port=8033: cannot be the same"),
    flag("--tls-cert-path {file}", "tls: must provide both cert and key", "set --tls-key-path"),
    flag("--tls-key-path {file}", "tls: must provide both cert and key", "set --tls-cert-path"),
    flag(
        "--tls-client-ca-cert-path {file}",
        "tls: cannot provide client ca cert without keypair",
        "set --tls-cert-path",
    ),
    flag("--fair-share-by api-key", "--fair-share-by=api-key", "set --api-keys-file too"),
    flag("--fair-share-by X-Tenant", "--fair-share-by=X-Tenant", "x-tenant"),
    flag("--tls-http", "--tls-http=true", "there is no certificate", "set --tls-cert-path"),
    flag(
        "--tls-cert-path {file} --tls-key-path {file} --tls-client-names a,b",
        "--tls-client-names=a,b",
        "set --tls-client-ca-cert-path too",
    ),
    flag("--tls-client-names a,,b", "--tls-client-names=a,,b", "expected names such as"),
    flag("--api-keys-file /no/keys", "couldn't load API keys from /no/keys", "a readable file"),
]
