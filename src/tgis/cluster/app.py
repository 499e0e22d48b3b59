"""The Serve application: replicas, how many, and who gets which request.

For a Serve config file: `import_path: tgis.cluster.app:build`, with `args` of two kinds: `ray`, the
options of `RayOptions`, and `settings`, the server's, by their names.
"""

import os
from collections.abc import Mapping
from typing import Any

import msgspec
from ray import serve

from tgis.cluster.options import RayOptions, checked
from tgis.cluster.replica import Replica
from tgis.config import SERVE, Config, parse
from tgis.config.fields import flag_of
from tgis.errors import ConfigError

NAME = "tgis"
_SPARE_CALLS = 1024  # beside those that generate: the server itself refuses what is too much
_REFUSED = ("tls_cert_path", "tls_key_path", "tls_client_ca_cert_path", "tls_http")


def application(config: Config, options: RayOptions) -> serve.Application:
    """The application for settings that have been read.

    Raises:
        ConfigError: a setting cannot work behind Serve's proxies.
    """
    for name in _REFUSED:
        if getattr(config, name):
            raise ConfigError(
                f"{flag_of(name)}: Serve's proxy ends connections, not the replicas; unset it, and"
                " put a gateway with TLS before the proxy"
            )
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=config.max_concurrent_requests + _SPARE_CALLS,
        graceful_shutdown_timeout_s=config.drain_timeout,
        max_constructor_retry_count=2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        **_scaling(options),
        **_resources(config, options),
        **_routing(options),
    )
    return deployment(Replica).bind(config)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for a Serve config file.

    Raises:
        ConfigError: an argument is unknown or not valid.
    """
    if unknown := set(args) - {"ray", "settings"}:
        raise ConfigError(f"args: {sorted(unknown)[0]}: unknown; expected ray and settings")
    words = [f"{flag_of(name)}={value}" for name, value in dict(args.get("settings", {})).items()]
    try:
        options = checked(msgspec.convert(dict(args.get("ray", {})), RayOptions))
    except msgspec.ValidationError as error:
        raise ConfigError(f"args: ray: {error}") from None
    return application(parse(words, os.environ, SERVE), options)


def _scaling(options: RayOptions) -> dict[str, Any]:
    if options.min_replicas == options.max_replicas:
        return {"num_replicas": options.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests,
            "upscale_delay_s": options.upscale_delay,
            "downscale_delay_s": options.downscale_delay,
            "look_back_period_s": min(30, max(1, options.upscale_delay)),
        }
    }


def _resources(config: Config, options: RayOptions) -> dict[str, Any]:
    """An actor's resources; for a model that is split, a placement group with a bundle per rank."""
    one = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    if config.num_shard < 2:
        return {"ray_actor_options": one}
    bundle = {"CPU": options.cpus, **({"GPU": options.gpus} if options.gpus else {})}
    return {
        "ray_actor_options": one,
        "placement_group_bundles": [bundle] * config.num_shard,
        "placement_group_strategy": "PACK",
    }


def _routing(options: RayOptions) -> dict[str, Any]:
    if options.routing != "prefix":
        return {}
    router = "tgis.cluster.router:PrefixRouter"
    return {"request_router_config": {"request_router_class": router}}
