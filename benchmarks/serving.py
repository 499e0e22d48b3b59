"""A server under load: throughput, time to first token, inter-token latency, peak memory.

    python -m benchmarks.serving --shape M --workloads W1 8 W2
    python -m benchmarks.serving --model <directory> -- --threads 1

Starts the server, offers each workload several times, ends the server. What follows `--` goes to
the server's command line. Compare two builds by running this on each in alternation: the machine's
own speed changes from minute to minute.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from tests.kit.processes import children
from tests.kit.server import Server, start_server

from benchmarks.load import Result, offered, workloads
from benchmarks.models import SHAPES, make_model


def peak_memory(pid: int) -> int:
    """Most bytes that a process has held so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def measure(server: Server, names: list[str], rounds: int) -> dict[str, list[Result]]:
    """Every workload, `rounds` times in alternation, after one round to warm up."""
    calls = workloads()
    results: dict[str, list[Result]] = {name: [] for name in names}
    for round_ in range(-1, rounds):
        for name in names:
            result = offered(server.grpc, calls[name])
            if round_ >= 0:
                results[name].append(result)
    return results


def print_table(results: dict[str, list[Result]]) -> None:
    """The median of each figure over the rounds, as Markdown."""
    header: list[str] = []
    for name, rounds in results.items():
        rows = [result.row() for result in rounds]
        if not header:
            header = list(rows[0])
            print("| workload | " + " | ".join(header) + " |")
            print("|---" * (len(header) + 1) + "|")
        cells = [f"{statistics.median(row[key] for row in rows):.1f}" for key in header]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="M")
    parser.add_argument("--model", type=Path, help="a model instead of random weights")
    parser.add_argument("--workloads", nargs="+", default=["W1", "8", "W2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("server_flags", nargs="*")
    arguments = parser.parse_args()
    cache = Path(tempfile.gettempdir()) / f"tgis-benchmark-{arguments.shape}"
    model = arguments.model or make_model(arguments.shape, cache)
    with tempfile.TemporaryDirectory() as directory:
        flags, dtype = arguments.server_flags, arguments.dtype
        server = start_server(model, Path(directory), *flags, dtype=dtype)
        try:
            server.wait_ready(300)
            print_table(measure(server, arguments.workloads, arguments.rounds))
            for name, pid in sorted(children(server.process.pid).items()):
                print(f"peak memory of {name}: {peak_memory(pid) / 2**20:.0f} MiB")
        finally:
            server.stop(30)


if __name__ == "__main__":
    main()
