"""What follows from several settings together: contradictions, deprecations, inferred values."""

from collections.abc import Mapping
from os import path
from typing import Any

import msgspec

from tgis.config.fields import FIELDS, place
from tgis.config.service import Note
from tgis.errors import ConfigError

_DEVICE_LISTS = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
_OLD_CACHES = ("TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE")
_PORTS = ("port", "grpc_port")


class Draft(msgspec.Struct):
    """Settings that are being completed; a value that is not there is at its default."""

    values: dict[str, Any]
    origins: dict[str, str]
    environ: Mapping[str, str]
    notes: list[Note]

    def get(self, name: str) -> Any:
        """The value that was given, or None."""
        return self.values.get(name)

    def put(self, name: str, value: Any, origin: str) -> None:
        """Set a value that follows from `origin`."""
        self.values[name] = value
        self.origins[name] = origin

    def env(self, variable: str) -> str:
        """An environment variable, "" where it is not set."""
        return self.environ.get(variable, "").strip()

    def where(self, name: str) -> str:
        """How a message about a setting begins; its default counts as given."""
        field = FIELDS[name]
        value = self.values.get(name, field.default)
        text = str(value).lower() if field.is_bool else str(value)
        return place(field, text, self.origins.get(name, ""))

    def warn(self, text: str) -> None:
        """Leave a warning for the log."""
        self.notes.append(Note("warning", text))

    def inform(self, text: str) -> None:
        """Leave a line for the log."""
        self.notes.append(Note("info", text))


def complete(draft: Draft) -> None:
    """Apply all rules in order.

    Raises:
        ConfigError: two settings contradict each other.
    """
    for rule in (
        _hub_cache,
        _world,
        _num_shard,
        _framework,
        _log_format,
        _tls,
        _fair_share,
        _ports,
    ):
        rule(draft)


def _hub_cache(draft: Draft) -> None:
    """TGIS: the first of the three variables, else $HF_HOME/hub, else ~/.cache/huggingface/hub."""
    home, hf_home = draft.env("HOME"), draft.env("HF_HOME")
    if draft.get("hf_hub_cache") is None and hf_home:
        draft.put("hf_hub_cache", path.join(hf_home, "hub"), "HF_HOME")
    elif draft.get("hf_hub_cache") is None and home:
        draft.put("hf_hub_cache", path.join(home, ".cache", "huggingface", "hub"), "HOME")
    cache = draft.get("hf_hub_cache") or ""
    if home and cache.startswith("~/"):
        draft.values["hf_hub_cache"] = path.join(home, cache[2:])
    for variable in _OLD_CACHES:
        if draft.env(variable) and draft.origins["hf_hub_cache"] != variable:
            draft.warn(
                f"{variable} is deprecated and should not be used. Use HF_HUB_CACHE instead."
            )


def _world(draft: Draft) -> None:
    """RANK and WORLD_SIZE: every process of the model is started by itself, as torchrun does."""
    world_size, shards = draft.get("world_size") or 1, draft.get("num_shard")
    for name, least in (("rank", 1), ("local_world_size", 0)):
        if (draft.get(name) or 0) + least > world_size:
            most = world_size - least
            raise ConfigError(f"{draft.where(name)}: at most {most} with WORLD_SIZE={world_size}")
    if world_size == 1:
        return
    if draft.get("rank") is None:
        raise ConfigError(
            f"{draft.where('world_size')}: set RANK too, which says which of them this process is"
        )
    if draft.get("master_port") in (0, 65535):
        raise ConfigError(f"{draft.where('master_port')}: the port above it cannot be listened on")
    if shards not in (None, world_size):
        both = f"{draft.where('num_shard')} and {draft.where('world_size')}"
        raise ConfigError(f"{both}: contradict each other; set one of them")
    draft.put("num_shard", world_size, "WORLD_SIZE")


def _num_shard(draft: Draft) -> None:
    """TGIS: counted from the visible devices where it is not given."""
    if draft.get("num_shard") is not None:
        return
    for variable in _DEVICE_LISTS:
        if variable in draft.environ:
            shards = len(draft.environ[variable].split(","))
            draft.inform(f"Inferring num_shard = {shards} from {'/'.join(_DEVICE_LISTS)}")
            draft.put("num_shard", shards, variable)
            return
    draft.inform("Defaulting num_shard to 1")


def _framework(draft: Draft) -> None:
    native = "tgis_native"
    if draft.get("deployment_framework") == "hf_custom_tp":
        draft.warn(
            'The "hf_custom_tp" deployment engine name is deprecated, please use "tgis_native"'
        )
        draft.values["deployment_framework"] = native
    for switch in ("paged_attention", "flash_attention"):
        asked = draft.get("deployment_framework")
        if draft.get(switch) and asked != native:
            if asked:
                draft.warn(
                    f"Using deployment engine {native} rather than {asked} because"
                    f" {switch.upper()} is enabled"
                )
            draft.put("deployment_framework", native, draft.origins[switch])


def _log_format(draft: Draft) -> None:
    if not draft.get("json_output"):
        return
    if draft.get("log_format") == "text":
        both = f"{draft.where('json_output')} and {draft.where('log_format')}"
        raise ConfigError(f"{both}: contradict each other; set one of them")
    draft.put("log_format", "json", draft.origins["json_output"])


def _tls(draft: Draft) -> None:
    cert, key = draft.get("tls_cert_path"), draft.get("tls_key_path")
    if bool(cert) != bool(key):
        given, missing = ("cert", "key") if cert else ("key", "cert")
        raise ConfigError(
            f"{draft.where(f'tls_{given}_path')}: tls: must provide both cert and key;"
            f" set --tls-{missing}-path too"
        )
    if draft.get("tls_client_ca_cert_path") and not cert:
        raise ConfigError(
            f"{draft.where('tls_client_ca_cert_path')}: tls: cannot provide client ca cert without"
            " keypair; set --tls-cert-path and --tls-key-path too"
        )
    if draft.get("tls_client_names") and not draft.get("tls_client_ca_cert_path"):
        raise ConfigError(
            f"{draft.where('tls_client_names')}: no client is asked for a certificate;"
            " set --tls-client-ca-cert-path too"
        )
    if draft.get("tls_http") and not cert:
        raise ConfigError(
            f"{draft.where('tls_http')}: there is no certificate;"
            " set --tls-cert-path and --tls-key-path too"
        )


def _fair_share(draft: Draft) -> None:
    if draft.get("fair_share_by") == "api-key" and not draft.get("api_keys_file"):
        raise ConfigError(
            f"{draft.where('fair_share_by')}: no client is asked for a key; set --api-keys-file too"
        )


def _ports(draft: Draft) -> None:
    port, grpc_port = (draft.values.get(name, FIELDS[name].default) for name in _PORTS)
    if port == grpc_port != 0:
        both = " and ".join(map(draft.where, _PORTS))
        raise ConfigError(f"{both}: cannot be the same; choose another for one")
