"""`tgis serve --ray`: replicas on a Ray cluster."""

import os
from collections.abc import Sequence

from tgis.cluster.options import HELP, require_ray, take_options
from tgis.config import SERVE, explain, help_text, parse
from tgis.errors import ConfigError

# What Ray reads from the environment when a cluster starts.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    # Proxy and replica speak gRPC, each on one event loop: half as much CPU for a streamed token.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


def serve_on_ray(words: Sequence[str]) -> int:
    """Read the settings and serve until told to stop; returns the exit code."""
    if not {"-h", "--help"}.isdisjoint(words):
        print(help_text(SERVE))
        print(HELP)
        return 0
    words, options = take_options(words)
    if options is None:
        raise ConfigError("--ray is missing")
    settings = [word for word in words if word not in ("--print-config", "--print_config")]
    config = parse(settings, os.environ, SERVE)
    if len(settings) < len(words):
        print(explain(config))
        return 0
    require_ray()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from tgis.cluster.launch import run  # imports Ray, which takes seconds

    return run(config, options)
