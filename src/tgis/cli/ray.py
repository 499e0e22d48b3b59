"""`tgis serve --ray`: replicas on a Ray cluster."""

import os
from collections.abc import Sequence

from tgis.cluster.options import HELP, require_ray, take_options
from tgis.config import SERVE, help_text, parse
from tgis.errors import ConfigError


def serve_on_ray(words: Sequence[str]) -> int:
    """Read the settings and serve until told to stop; returns the exit code."""
    if not {"-h", "--help"}.isdisjoint(words):
        print(help_text(SERVE))
        print(HELP)
        return 0
    words, options = take_options(words)
    if options is None:
        raise ConfigError("--ray is missing")
    config = parse(words, os.environ, SERVE)
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    from tgis.cluster.launch import run  # imports Ray, which takes seconds

    return run(config, options)
