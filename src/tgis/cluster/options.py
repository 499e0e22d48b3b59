"""What is asked of Ray: the options that begin with --ray, and what they become.

Knows nothing of Ray, so that help and errors do not need it.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import msgspec

from tgis.errors import ConfigError

INSTALL = "pip install 'tgis[ray]'"
PREFIX = "--ray-"
HELP = """\
with Ray (pip install 'tgis[ray]'):
  --ray                        run on a Ray cluster
  --ray-address ADDRESS        of the cluster: auto or HOST:PORT; without it, one on this machine
  --ray-replicas N | MIN:MAX   servers; with MIN:MAX as many as the load needs (1)
  --ray-target-requests N      requests that a replica should have at once, for MIN:MAX (32)
  --ray-upscale-delay S        seconds that the load must last before replicas come (30)
  --ray-downscale-delay S      ... and before they go (600)
  --ray-routing ROUTING        least-loaded, or prefix: prompts that begin alike meet
  --ray-cpus N                 cores set aside for each process of a replica (1)
  --ray-gpus N                 devices set aside for each process of a replica (0)
"""


class RayOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options, each with its default."""

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 32
    upscale_delay: float = 30
    downscale_delay: float = 600
    routing: str = "least-loaded"
    cpus: float = 1
    gpus: float = 0


ROUTINGS = ("least-loaded", "prefix")
_NUMBERS = ("target-requests", "upscale-delay", "downscale-delay", "cpus", "gpus")
_NAMES = ("address", "replicas", "routing", *_NUMBERS)


def take_options(words: Sequence[str]) -> tuple[list[str], RayOptions | None]:
    """Split a command line: the words that are not about Ray, and the options if `--ray` is there.

    Raises:
        ConfigError: an option is unknown or its value is not valid.
    """
    rest: list[str] = []
    texts: dict[str, str] = {}
    asked = False
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag == "--ray" and not equals:
            asked = True
        elif flag.startswith(PREFIX):
            name = flag.removeprefix(PREFIX)
            if name not in _NAMES:
                raise ConfigError(f"{flag}: unknown option; expected one of {_listed()}")
            texts[name] = value if equals else next(left, "")
            if not texts[name]:
                raise ConfigError(f"{flag}: has no value")
        else:
            rest.append(word)
    if texts and not asked:
        raise ConfigError(f"{PREFIX}{next(iter(texts))}: has no effect without --ray")
    return rest, (_options(texts) if asked else None)


def require_ray() -> None:
    """See that Ray is here.

    Raises:
        ConfigError: it is not; the text has the line that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"--ray: Ray is not installed; {INSTALL}")


def checked(options: RayOptions) -> RayOptions:
    """The same options.

    Raises:
        ConfigError: a value is out of range.
    """
    rules = (
        (1 <= options.min_replicas <= options.max_replicas, "replicas", "N or MIN:MAX from 1"),
        (options.routing in ROUTINGS, "routing", " or ".join(ROUTINGS)),
        (options.target_requests > 0, "target-requests", "a number above 0"),
        (options.upscale_delay >= 0, "upscale-delay", "seconds from 0"),
        (options.downscale_delay >= 0, "downscale-delay", "seconds from 0"),
        (options.cpus >= 0, "cpus", "a number from 0"),
        (options.gpus >= 0, "gpus", "a number from 0"),
    )
    for holds, name, expected in rules:
        if not holds:
            raise ConfigError(f"{PREFIX}{name}: out of range; expected {expected}")
    return options


def _options(texts: dict[str, str]) -> RayOptions:
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name == "replicas":
            low, _, high = text.partition(":")
            values["min_replicas"] = _number(name, low, int)
            values["max_replicas"] = _number(name, high or low, int)
        elif name in _NUMBERS:
            values[name.replace("-", "_")] = _number(name, text, float)
        else:
            values[name] = text
    return checked(RayOptions(**values))


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{PREFIX}{name}={text[:40]!a}: not a number") from None


def _listed() -> str:
    return ", ".join(PREFIX + name for name in _NAMES)
