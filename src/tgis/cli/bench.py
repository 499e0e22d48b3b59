"""`tgis bench step`: how long a model's steps take here, and where the time goes."""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from tgis.config import SERVE, parse
from tgis.engines.threads import prepare_openmp
from tgis.errors import ConfigError

_DESCRIPTION = """\
Decodes batches of sequences without a server around them: each step is scheduled, computed,
sampled and turned into messages as in one, and no client takes any of the machine's time. All
that is not listed here is a setting of the server, as for `tgis serve`; alone on the command line
stands the model.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; tgis bench step --help lists all arguments")


def bench(words: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    if words[:1] != ["step"] and not {"-h", "--help"}.intersection(words[:1]):
        raise ConfigError("tgis bench: say what: tgis bench step [arguments]")
    given, rest = _parser().parse_known_args(words[words[:1] == ["step"] :])
    config = parse(rest, os.environ, SERVE)
    prepare_openmp(os.environ)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler has nothing to say
    from tgis.bench.step import run  # not before the settings are known to be right

    run(config, given.rows, given.context, given.steps, given.profile)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tgis bench step",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, meaning in (
        ("--rows", [1, 8, 32], "sequences that decode together (1 8 32)"),
        ("--context", [128], "tokens of each (128)"),
    ):
        parser.add_argument(
            name, type=_positive, nargs="+", default=default, metavar="N", help=meaning
        )
    parser.add_argument("--steps", type=_positive, default=50, metavar="N", help="measured (50)")
    parser.add_argument(
        "--profile", action="store_true", help="show where the time goes; costs some itself"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value
