"""`tgis generate`, `tgis chat` and `tgis health`: their arguments, and what they print.

The calls themselves are in `tgis.cli.calls`, which takes long to import; `--help` must not.
"""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tgis.cli.calls import Reply, Server

GENERATION_SERVICE = "fmaas.GenerationService"
MAX_NEW_TOKENS = 200  # unless the server's limit is lower

_CHAT_HELP = """\
Each line that you type is added to the text so far, and the model continues it. An empty line
lets it go on, /new begins anew, /quit or Ctrl-D ends; Ctrl-C stops the model.
"""


class CallError(Exception):
    """A call failed; `str()` is one line for the user."""


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the three commands; each sets `run`, which takes the arguments to an exit code."""
    generate = subparsers.add_parser(
        "generate", help="generate text with a running server", description=generate_text.__doc__
    )
    generate.add_argument("text", nargs="?", help="what to continue; read from stdin if absent")
    generate.add_argument("--no-stream", action="store_true", help="print the text when complete")
    generate.add_argument("--echo", action="store_true", help="print the input before the output")
    generate.add_argument("--stats", action="store_true", help="counts and times on stderr")
    _add_parameters(generate)
    generate.set_defaults(run=_reporting(generate_text))

    chat = subparsers.add_parser("chat", help="talk to a running server", description=_CHAT_HELP)
    _add_parameters(chat)
    chat.set_defaults(run=_reporting(hold_chat), temperature=0.7)

    health = subparsers.add_parser(
        "health", help="ask a running server how it is", description=show_health.__doc__
    )
    health.add_argument("--timeout", type=float, default=5.0, help="seconds (%(default)s)")
    health.set_defaults(run=_reporting(show_health))
    for parser in (generate, chat, health):
        add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    """How to reach the server."""
    group = parser.add_argument_group("connection")
    group.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    group.add_argument("--port", type=_port, default=8033, help="gRPC port (%(default)s)")
    group.add_argument("--api-key-file", metavar="PATH", help="the key, if the server asks for one")
    add_tls(parser)


def add_tls(parser: argparse.ArgumentParser) -> None:
    """How to trust the server, and be trusted."""
    group = parser.add_argument_group("TLS")
    group.add_argument("--tls", action="store_true", help="TLS with the system's authorities")
    group.add_argument("--tls-ca", metavar="PEM", help="TLS with these authorities")
    group.add_argument("--tls-cert", metavar="PEM", help="our certificate, if one is demanded")
    group.add_argument("--tls-key", metavar="PEM", help="its private key")


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation; any sampling option turns sampling on")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"({MAX_NEW_TOKENS}, or the server's limit if that is lower)",
    )
    group.add_argument("--min-new-tokens", type=int, default=0)
    group.add_argument("--sample", action="store_true", help="choose at random, not the likeliest")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--typical-p", type=float)
    group.add_argument("--seed", type=int, help="makes sampling repeatable")
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--stop", action="append", default=[], help="end here; may be repeated")
    group.add_argument("--time-limit", type=float, default=0, metavar="SECONDS")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:  # gRPC takes it modulo 65536
        raise argparse.ArgumentTypeError(f"{text}: must be from 1 to 65535")
    return int(text)


def address_of(args: argparse.Namespace) -> str:
    """The server's address as gRPC spells it."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"{host}:{args.port}"


def _reporting(
    command: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """Run a command; a failed call becomes one line on stderr and exit code 1."""

    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except CallError as error:
            print(f"tgis: {error}", file=sys.stderr)
            return 1

    return run


def generate_text(args: argparse.Namespace) -> int:
    """Continue a text and print the continuation as it appears."""
    from tgis.cli.calls import Server

    text = sys.stdin.read() if args.text is None else args.text
    with Server.connect(args) as server:
        reply = server.generate(text, args, streaming=not args.no_stream)
        if args.echo:
            _show(text)
        for piece in reply:
            _show(piece)
        _show("\n")
    if args.stats:
        print(_stats(reply), file=sys.stderr)
    return 0


def hold_chat(args: argparse.Namespace) -> int:
    """Continue a text together with the user."""
    from tgis.cli.calls import Server

    if sys.stdin.isatty():
        print(_CHAT_HELP)
    text = ""
    with Server.connect(args) as server:
        while (line := _read_line()) not in (None, "/quit"):
            if line == "/new":
                text = ""
                continue
            text = f"{text}\n{line}" if text and line else text + (line or "")
            if text:
                text += _reply_to(text, server, args)
    return 0


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _reply_to(text: str, server: "Server", args: argparse.Namespace) -> str:
    """Print the model's part and return it; trouble ends the part but not the chat."""
    pieces = []
    try:
        for piece in server.generate(text, args, streaming=True, forgetting=True):
            pieces.append(piece)
            _show(piece)
    except KeyboardInterrupt:
        pass  # enough of it
    except CallError as error:
        print(f"tgis: {error}", file=sys.stderr)
    _show("\n")
    return "".join(pieces)


def show_health(args: argparse.Namespace) -> int:
    """Print SERVING and exit with 0, or another status and 1."""
    from tgis.cli.calls import health

    status = health(address_of(args), GENERATION_SERVICE, args.timeout, args)
    print(status)
    return 0 if status == "SERVING" else 1


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _stats(reply: "Reply") -> str:
    rate = reply.num_tokens / reply.seconds if reply.seconds else 0.0
    seed = f", seed {reply.seed}" if reply.seed else ""
    return (
        f"[{reply.num_input_tokens} + {reply.num_tokens} tokens, {reply.stop_reason}{seed}, "
        f"{reply.seconds:.2f} s, {rate:.0f} tokens/s]"
    )
