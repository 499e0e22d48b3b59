"""`text-generation-server`: TGIS's tool for model files, and its way to start a server.

Commands and options may be written with dashes or underscores. What a command needs is imported
when it runs.
"""

import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from tgis import __version__
from tgis.cli.failure import exit_code_of
from tgis.errors import ConfigError

PROGRAM = "text-generation-server"
_DESCRIPTION = "Fetch and convert model files. `COMMAND --help` says more."


class Command(NamedTuple):
    """A subcommand: `run` takes the parsed arguments and returns an exit code.

    One that has no `run` is refused, and `help` says why.
    """

    help: str
    add_arguments: Callable[[ArgumentParser], None] | None = None
    run: Callable[[Namespace], int] | None = None


class Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise ConfigError(f"{message}; {self.prog} --help lists all arguments")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = [_with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    if words:
        words[0] = words[0].replace("_", "-")
    return exit_code_of(lambda: _main(words), PROGRAM)


def _with_dashes(word: str) -> str:
    flag, equals, value = word.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


def _main(words: list[str]) -> int:
    if words and (known := COMMANDS.get(words[0])) and known.run is None:
        raise ConfigError(f"{words[0]}: {known.help}")
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description=_DESCRIPTION)
    parser.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, allow_abbrev=False)
        if command.add_arguments:
            command.add_arguments(added)
        added.set_defaults(run=command.run)
    arguments = parser.parse_args(words or ["--help"])
    return int(arguments.run(arguments))


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model_name", metavar="MODEL_NAME", help="name on the hub, or a directory")
    parser.add_argument("--revision", help="branch, tag or commit [main]")


def _add_download(parser: ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--token", help="for the hub; better in HF_TOKEN, where nobody sees it")
    parser.add_argument(
        "--extension",
        default=".safetensors",
        metavar=".EXT[,.EXT...]",
        help="of the files wanted; a single one brings .json, .py, .model and .md too"
        " [%(default)s]",
    )
    parser.add_argument(
        "--auto-convert",
        action=BooleanOptionalAction,
        default=True,
        help="make safetensors and a fast tokenizer where the hub has none [yes]",
    )
    parser.add_argument("--workers", type=int, default=5, help="files at once [%(default)s]")


def _download(arguments: Namespace) -> int:
    from tgis.cli.model_files import download_weights

    return download_weights(arguments, os.environ)


def _convert_weights(arguments: Namespace) -> int:
    from tgis.cli.model_files import convert_to_safetensors

    return convert_to_safetensors(arguments, os.environ)


def _add_tokenizer(parser: ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--output-path", help="directory for tokenizer.json [the model's own]")


def _convert_tokenizer(arguments: Namespace) -> int:
    from tgis.cli.model_files import convert_to_fast_tokenizer

    return convert_to_fast_tokenizer(arguments, os.environ)


def _add_onnx(parser: ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("target", metavar="TARGET", help="directory to make; new, or empty")
    parser.add_argument(
        "--merge-graphs",
        action=BooleanOptionalAction,
        default=False,
        help="one graph for all passes of a decoder behind an encoder; others are one already [no]",
    )
    parser.add_argument(
        "--optimize",
        action=BooleanOptionalAction,
        default=False,
        help="let ONNX Runtime rewrite the graphs for the provider [no]",
    )
    parser.add_argument(
        "--provider", help="ONNX Runtime's execution provider [CUDA's, if there is one; CPU's]"
    )


def _convert_onnx(arguments: Namespace) -> int:
    from tgis.cli.model_files import convert_to_onnx

    return convert_to_onnx(arguments, os.environ)


def _add_quantize(parser: ArgumentParser) -> None:
    from tgis.cli.quantize import add_arguments

    add_arguments(parser)


def _quantize(arguments: Namespace) -> int:
    from tgis.cli.quantize import run

    return run(arguments, os.environ)


# Option of `serve` -> setting of the server.
_SETTINGS = {
    "dtype": "dtype",
    "quantize": "quantize",
    "max-sequence-length": "max-sequence-length",
    "max-new-tokens": "max-new-tokens",
    "max-batch-size": "max-batch-size",
    "batch-safety-margin": "batch-safety-margin",
    "revision": "revision",
    "cuda-process-memory-fraction": "cuda-process-memory-fraction",
    "uds-path": "shard-uds-path",
}
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _add_serve(parser: ArgumentParser) -> None:
    parser.description = (
        "One process tree serves gRPC and HTTP. Options that are not given, and all other settings,"
        " are those of text-generation-launcher and its environment variables."
    )
    parser.add_argument(
        "model_name", metavar="MODEL_NAME", help="name in the cache, or a directory"
    )
    parser.add_argument("framework", metavar="DEPLOYMENT_FRAMEWORK", help="such as tgis_native")
    for option, setting in _SETTINGS.items():
        parser.add_argument(f"--{option}", help=f"as --{setting} of text-generation-launcher")
    parser.add_argument(
        "--sharded",
        action=BooleanOptionalAction,
        default=False,
        help=f"as one of several processes; needs {', '.join(_RENDEZVOUS)} [no]",
    )


def _serve(arguments: Namespace) -> int:
    from tgis.cli.serve import serve
    from tgis.config import Program, termination_log_path

    if arguments.sharded:
        log = termination_log_path([], os.environ)
        if code := exit_code_of(_check_rendezvous, PROGRAM, log):
            return code
    return serve(launcher_flags(arguments), Program(f"{PROGRAM} serve", {}))


def launcher_flags(arguments: Namespace) -> list[str]:
    """The options of `serve` as text-generation-launcher's."""
    flags = [f"--model-name={arguments.model_name}"]
    flags += [f"--deployment-framework={arguments.framework}"]
    for option, setting in _SETTINGS.items():
        if (value := getattr(arguments, option.replace("-", "_"))) is not None:
            flags.append(f"--{setting}={value}")
    return flags


def _check_rendezvous() -> int:
    for variable in _RENDEZVOUS:
        if not os.environ.get(variable):
            raise ConfigError(f"{variable} must be set when sharded is True")
    return 0


COMMANDS: dict[str, Command] = {
    "serve": Command("serve a model over gRPC and HTTP", _add_serve, _serve),
    "download-weights": Command("fetch a model from the hub", _add_download, _download),
    "convert-to-safetensors": Command(
        "make safetensors of a model's .bin weights", _add_model, _convert_weights
    ),
    "convert-to-fast-tokenizer": Command(
        "make a model's tokenizer.json", _add_tokenizer, _convert_tokenizer
    ),
    "convert-to-onnx": Command(
        "make ONNX files of a model, for the engine hf_optimum_ort", _add_onnx, _convert_onnx
    ),
    "quantize": Command("make a GPTQ checkpoint of a model", _add_quantize, _quantize),
}


if __name__ == "__main__":
    sys.exit(main())
