"""Settings of the service: network, access, text, logs, life; and `Config`, the whole."""

import re
from typing import Annotated, Literal, get_args

import msgspec

from tgis.config.setting import (
    HOST,
    KINDS,
    PORT,
    SECONDS,
    SIZE,
    Check,
    Kind,
    Setting,
    at_least,
    between,
    readable_file,
)
from tgis.config.speculation import SpeculationSettings

NETWORK = "Network"
ACCESS = "TLS and access"
TEXT = "Text"
PROMPTS = "Soft prompts and adapters"
OBSERVE = "Logs, metrics, traces"
LIFE = "Start and stop"

LogLevel = Literal["trace", "debug", "info", "warning", "error", "off"]

_LEVELS: dict[str, LogLevel] = {name: name for name in get_args(LogLevel)} | {"warn": "warning"}


def _log_level(text: str) -> LogLevel:
    """A level, also as the one without a target in a filter such as `info,tower=warn`."""
    plain = [part.strip() for part in text.lower().split(",") if "=" not in part]
    return _LEVELS[plain[0]]


class ServiceSettings(SpeculationSettings, frozen=True, kw_only=True):
    """The last part of `Config`."""

    host: Annotated[
        str,
        Setting(NETWORK, "address that both ports listen on; 0.0.0.0 for the launcher", check=HOST),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Setting(NETWORK, "HTTP port: health and metrics; 0 = any free", short="p", check=PORT),
    ] = 3000
    grpc_port: Annotated[
        int, Setting(NETWORK, "gRPC port; 0 = any free", short="g", check=PORT)
    ] = 8033
    max_message_bytes: Annotated[
        int,
        Setting(
            NETWORK,
            "largest gRPC message that is accepted, in bytes",
            kind=SIZE,
            check=Check("from 1KiB to 1GiB", lambda v: 1024 <= v <= 2**30),
        ),
    ] = 4 * 2**20
    write_timeout: Annotated[
        float,
        Setting(
            NETWORK,
            "seconds after which a stream of which nothing is read ends",
            check=SECONDS,
        ),
    ] = 30.0
    shard_uds_path: Annotated[
        str,
        Setting(
            NETWORK,
            "path of the shards' sockets",
            no_effect="the processes talk over a socket in a private directory",
        ),
    ] = "/tmp/text-generation-server"

    tls_cert_path: Annotated[
        str | None,
        Setting(
            ACCESS,
            "PEM certificate chain of the gRPC port",
            aliases={"ssl_certfile": ""},
            check=readable_file("cert"),
            unset="no TLS",
        ),
    ] = None
    tls_key_path: Annotated[
        str | None,
        Setting(
            ACCESS,
            "PEM private key of the gRPC port",
            aliases={"ssl_keyfile": ""},
            check=readable_file("key"),
            unset="no TLS",
        ),
    ] = None
    tls_client_ca_cert_path: Annotated[
        str | None,
        Setting(
            ACCESS,
            "PEM authorities whose client certificates are demanded",
            aliases={"ssl_ca_certs": ""},
            check=readable_file("client ca cert"),
            unset="clients need no certificate",
        ),
    ] = None
    tls_client_names: Annotated[
        str | None,
        Setting(
            ACCESS,
            "names of which a client certificate must carry one, separated by commas",
            check=Check(
                "names such as client.example.org,spiffe://example.org/client",
                lambda v: all(part.strip() for part in v.split(",")),
            ),
            unset="any certificate of the authorities will do",
        ),
    ] = None
    tls_http: Annotated[
        bool, Setting(ACCESS, "TLS with the same certificate on the HTTP port too")
    ] = False
    api_keys_file: Annotated[
        str | None,
        Setting(
            ACCESS,
            "file of SHA-256 hashes of accepted API keys, one a line",
            check=readable_file("API keys"),
            unset="no key is asked for",
        ),
    ] = None

    fair_share_by: Annotated[
        str | None,
        Setting(
            ACCESS,
            "tenants get equal shares; `api-key` or the metadata entry that tells them apart",
            check=Check(
                "api-key, or the name of a metadata entry such as x-tenant",
                lambda v: bool(re.fullmatch(r"[a-z][a-z0-9_.-]{0,63}", v)),
            ),
            unset="first come, first served",
        ),
    ] = None

    output_special_tokens: Annotated[
        bool, Setting(TEXT, "leave special tokens in generated text")
    ] = False
    default_include_stop_seqs: Annotated[
        bool,
        Setting(TEXT, "a stop sequence is part of the text where a request does not say"),
    ] = True
    add_special_tokens: Annotated[
        bool, Setting(TEXT, "put the tokenizer's special tokens around inputs")
    ] = True

    prefix_store_path: Annotated[
        str | None,
        Setting(
            PROMPTS,
            "directory of soft prompts and adapters",
            aliases={"adapter_cache": ""},
            unset="requests cannot name any",
        ),
    ] = None
    prompt_cache_size_mb: Annotated[
        int,
        Setting(
            PROMPTS,
            "MiB for loaded soft prompts",
            check=between(0, 10**6, noun="an integer"),
        ),
    ] = 512
    lora_cache_size_mb: Annotated[
        int,
        Setting(
            PROMPTS,
            "MiB for loaded LoRA adapters",
            check=between(0, 10**6, noun="an integer"),
        ),
    ] = 1024
    max_prompt_prefix_length: Annotated[
        int | None,
        Setting(
            PROMPTS,
            "most virtual tokens of a soft prompt",
            kind=KINDS[int]._replace(text="Invalid value for MAX_PROMPT_PREFIX_LENGTH"),
            check=at_least(1, "Invalid value for MAX_PROMPT_PREFIX_LENGTH"),
            unset="half of max_sequence_length",
        ),
    ] = None

    log_level: Annotated[
        LogLevel,
        Setting(
            OBSERVE,
            "least level that is logged",
            kind=Kind("one of trace, debug, info, warning, error, off", _log_level),
        ),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Setting(OBSERVE, "how log lines are written")
    ] = "text"
    json_output: Annotated[bool, Setting(OBSERVE, "the same as --log-format json")] = False
    log_prompts: Annotated[
        bool,
        Setting(OBSERVE, "log the first 32 columns of inputs and outputs"),
    ] = True
    metrics_compat: Annotated[
        bool,
        Setting(
            OBSERVE,
            "add the metric names that autoscalers of other servers read (vllm:...)",
        ),
    ] = False
    otlp_endpoint: Annotated[
        str | None,
        Setting(
            OBSERVE,
            "OTLP/gRPC endpoint that receives traces",
            check=Check(
                "a URL such as http://localhost:4317",
                lambda v: v.startswith(("http://", "https://", "grpc://")),
            ),
            unset="no tracing",
        ),
    ] = None
    otlp_service_name: Annotated[
        str,
        Setting(
            OBSERVE,
            "name of this service in traces",
            aliases={"otel_service_name": ""},
        ),
    ] = "text-generation-inference.router"

    hang_timeout: Annotated[
        float,
        Setting(
            LIFE,
            "seconds without a sign of life after which the core is replaced",
            check=between(1, 86400, noun="a number of seconds"),
        ),
    ] = 5.0
    max_step_seconds: Annotated[
        float | None,
        Setting(
            LIFE,
            "age of a step at which the core is replaced even if it still computes",
            check=between(1, 86400, noun="a number of seconds"),
            unset="a step may compute for as long as it needs",
        ),
    ] = None
    drain_timeout: Annotated[
        float,
        Setting(
            LIFE,
            "seconds that running requests get to finish at shutdown",
            check=between(0, 86400, noun="a number of seconds"),
        ),
    ] = 60.0
    termination_log: Annotated[
        str,
        Setting(LIFE, "file for the reason of a failure", aliases={"termination_log_dir": ""}),
    ] = "/dev/termination-log"


class Note(msgspec.Struct, frozen=True):
    """A line for the log about a setting, to be written once the log is open."""

    level: Literal["info", "warning"]
    text: str


class Config(ServiceSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one server; `parse` makes it, and it travels to the processes as msgpack.

    Defaults are those of `tgis serve`.
    """

    # Setting -> the flag or variable it came from; settings at their default are absent.
    origins: dict[str, str] = msgspec.field(default_factory=dict)
    notes: tuple[Note, ...] = ()
