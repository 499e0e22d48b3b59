"""`tgis batch`: answers for a whole file of prompts."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tgis.config import SERVE, parse
from tgis.errors import ConfigError

_DESCRIPTION = """\
Each line of the input is a JSON object: "text", and if wanted "id" (any value; it comes back) and
"params" (fmaas.Parameters in JSON, before those of --params). Each row of the output is the answer
to one row of the input, or its error. Ended at any moment, the job goes on when the same command is
given again. All that is not listed here is a setting of the server, as for `tgis serve`; alone on
the command line stands the model.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; tgis batch --help lists all arguments")


def batch(words: Sequence[str]) -> int:
    """Run a job; returns the exit code."""
    from tgis.cluster.options import require_ray, take_options

    words, ray = take_options(words)
    given, rest = _parser().parse_known_args(words)
    config = parse(rest, os.environ, SERVE)
    if ray is not None:
        require_ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    from tgis.batch.run import Options, run  # not before the settings are known to be right

    options = Options(
        input=given.input,
        output=given.output,
        params=given.params,
        rows_per_shard=given.rows_per_shard,
        in_flight=given.in_flight,
        stop=given.on_error == "stop",
        ray=ray,
    )
    return run(options, config)


def _parser() -> argparse.ArgumentParser:
    from tgis.cluster.options import HELP

    parser = _Parser(
        prog="tgis batch",
        description=_DESCRIPTION,
        epilog=HELP,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="made if need be")
    parser.add_argument(
        "--params",
        type=_params,
        default={},
        metavar="JSON",
        help='parameters of all rows, such as \'{"stopping": {"max_new_tokens": 50}}\', or @FILE',
    )
    parser.add_argument(
        "--on-error",
        choices=("continue", "stop"),
        default="continue",
        help="what a row without an answer does: get a row that says why, or end the job",
    )
    parser.add_argument(
        "--rows-per-shard", type=_positive, default=1000, metavar="N", help="(1000)"
    )
    parser.add_argument(
        "--in-flight", type=_positive, default=256, metavar="N", help="rows under way at once (256)"
    )
    return parser


def _params(text: str) -> dict[str, Any]:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{text[1:]}: cannot be read: {error}") from None
    try:
        params = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(params, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return params


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!a}: must be an integer from 1")
    return int(text)
