"""`grpc_healthcheck`: one health check, as the probes of existing deployments call it."""

import argparse
from collections.abc import Sequence

from tgis.cli.client import GENERATION_SERVICE, CallError, add_tls


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Prints the answer; 0 = SERVING, 1 = anything else."""
    args = _parser().parse_args(argv)
    args.tls = args.tls or args.secure
    print("health check...", end="", flush=True)
    try:
        from tgis.cli.calls import health

        status = health(args.server_url, args.service_name, args.timeout, args)
    except CallError as error:
        print(f" failed: {error}")
        return 1
    print(f" status: {status}")
    return 0 if status == "SERVING" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grpc_healthcheck", description="Check a gRPC server.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--insecure", action="store_true", help="no TLS; the default")
    group.add_argument("--secure", action="store_true", help="the same as --tls")
    parser.add_argument("--server-url", default="localhost:8033", help="(%(default)s)")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds (%(default)s)")
    parser.add_argument("--service-name", default=GENERATION_SERVICE, help="(%(default)s)")
    add_tls(parser)
    return parser
