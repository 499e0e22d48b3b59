"""What other processes cost a server: `python -m benchmarks.neighbours [--checkout OTHER ...]`.

A neighbour computes and sleeps in turns, 20 ms each. Servers of several checkouts of this project
are loaded at the same time and take turns, so that a busy machine slows all of them alike.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from tests.kit.server import Server, start_server

from benchmarks.load import offered, workloads
from benchmarks.models import make_model

HERE = Path(__file__).parents[1]
NEIGHBOUR = """
import time
while True:
    end = time.monotonic() + 0.02
    while time.monotonic() < end:
        pass
    time.sleep(0.02)
"""


def start(checkout: Path, model: Path, stack: ExitStack) -> Server:
    """A server of another checkout, with the packages of this one."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    env = {"PYTHONPATH": str(checkout / "src")}
    server = start_server(model, directory, "--prefix-caching", "false", dtype="bfloat16", env=env)
    stack.callback(server.stop, 30)
    server.wait_ready(600)
    return server


def measure(servers: list[Server], workload: str, rounds: int) -> list[float]:
    """Tokens per second of each, medians of rounds in turns."""
    calls = workloads()[workload]
    rates: list[list[float]] = [[] for _ in servers]
    for _ in range(rounds):
        for server, found in zip(servers, rates, strict=True):
            found.append(offered(server.grpc, calls).tokens_per_second)
    return [median(found) for found in rates]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What other processes cost a server.")
    parser.add_argument("--checkout", type=Path, nargs="*", default=[], help="others to compare")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2"])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    checkouts = [HERE, *given.checkout]
    with ExitStack() as stack:
        model = make_model("M", Path(stack.enter_context(tempfile.TemporaryDirectory())))
        servers = [start(checkout, model, stack) for checkout in checkouts]
        for server in servers:
            offered(server.grpc, workloads()["W2"])  # warm
        print(f"| neighbours | workload | {' | '.join(path.name for path in checkouts)} |")
        print("|---|---" + "|---" * len(checkouts) + "|")
        for count in given.neighbours:
            command = [sys.executable, "-c", NEIGHBOUR]
            processes = [subprocess.Popen(command) for _ in range(count)]
            try:
                for workload in given.workloads:
                    rates = measure(servers, workload, given.rounds)
                    cells = " | ".join(f"{rate:,.0f}" for rate in rates)
                    print(f"| {count} | {workload} | {cells} |", flush=True)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()


if __name__ == "__main__":
    main()
