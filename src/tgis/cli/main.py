"""`tgis`: one command with subcommands, each imported only when it is used."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from tgis import __version__
from tgis.cli.failure import exit_code_of
from tgis.errors import ConfigError


class Command(NamedTuple):
    """A subcommand; `target` is "module:function".

    A function called `add_parsers` adds the command to an argparse subparsers object, with a
    default `run` that takes the parsed arguments; any other takes the words after the command's
    name. Both return an exit code.
    """

    help: str
    target: str


COMMANDS = {
    "serve": Command("serve a model over gRPC and HTTP", "tgis.cli.main:_serve"),
    "generate": Command("generate text with a running server", "tgis.cli.client:add_parsers"),
    "chat": Command("talk to a running server", "tgis.cli.client:add_parsers"),
    "batch": Command("answer a whole file of prompts", "tgis.cli.batch:batch"),
    "bench": Command("measure the steps of a model", "tgis.cli.bench:bench"),
    "adapters": Command("list or check soft prompts and LoRA", "tgis.cli.adapters:add_parsers"),
    "plan": Command("how many replicas a load needs", "tgis.cli.plan:plan"),
    "health": Command("ask a running server how it is", "tgis.cli.client:add_parsers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _main(words), "tgis")


def _main(words: list[str]) -> int:
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(_help())
        return 0
    if first in ("-V", "--version"):
        print("tgis", __version__)
        return 0
    if first not in COMMANDS:
        raise ConfigError(_unknown(first))
    return _run(first, words)


def _run(name: str, words: list[str]) -> int:
    module, _, function = COMMANDS[name].target.partition(":")
    target = getattr(import_module(module), function)
    if function == "add_parsers":
        return _run_parsed(target, words)
    return int(target(words[1:]))


def _run_parsed(add_parsers: Callable[..., None], words: list[str]) -> int:
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        """Says what is wrong in one line."""

        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; {self.prog} --help lists all arguments")

    parser = Parser(prog="tgis")
    add_parsers(parser.add_subparsers(required=True))
    arguments = parser.parse_args(words)
    return int(arguments.run(arguments))


def _serve(words: Sequence[str]) -> int:
    from tgis.cli.serve import serve
    from tgis.config import SERVE

    if any(word.startswith("--ray") for word in words):
        from tgis.cli.ray import serve_on_ray

        return serve_on_ray(words)
    return serve(words, SERVE)


def _help() -> str:
    lines = ["usage: tgis COMMAND [arguments]", ""]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`tgis COMMAND --help` says more; `tgis --version` says which."])


def _unknown(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    return f"{word!a}: unknown command; {hint}"


if __name__ == "__main__":
    sys.exit(main())
