"""What Ray Serve's proxy costs: a server behind it against the same server asked directly.

    python -m benchmarks.ray_serve --shape M

A server that is asked directly, one as `tgis serve --ray` sets Serve, and one with Serve's own
settings run at the same time and are asked in turns; those that are not asked wait.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import grpc
from tests.kit.ray_cluster import REPLICA, named, run_on_ray
from tests.kit.server import Server, start_server

from benchmarks.load import Call, Result, offer, percentile
from benchmarks.models import SHAPES, make_model
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

STREAMS = (1, 8, 32)
DIRECT, OURS, SERVES = "direct", "through Serve", "with Serve's own settings"
# What Ray does where nothing is set; a variable that is there is not replaced.
SERVES_OWN = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1",
}


async def unary(address: str, number: int) -> list[float]:
    """Seconds of calls for one token, one after the other."""
    single = Call(16, 1).message()
    request = pb.BatchedGenerationRequest(requests=[single.request], params=single.params)
    seconds = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        for _ in range(number):
            start = time.perf_counter()
            await stub.Generate(request)
            seconds.append(time.perf_counter() - start)
    return seconds


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cost_per_token(server: Server) -> None:
    """Print the CPU time of every process on a token's way, at the largest number of streams."""
    pid = server.process.pid
    parts = {"proxy": "ray::ProxyActor", "replica's actor": REPLICA, "front": "tgis.front"}
    pids = {name: next(iter(named(pid, line))) for name, line in parts.items()}
    before = {name: cpu_seconds(number) for name, number in pids.items()}
    calls = [Call(128, 128, seed) for seed in range(max(STREAMS))]
    asyncio.run(offer(server.grpc, calls))
    tokens = sum(call.new_tokens for call in calls)
    print("\n| CPU time of a streamed token | µs |\n|---|---|")
    for name, number in pids.items():
        print(f"| {name} | {(cpu_seconds(number) - before[name]) / tokens * 1e6:.0f} |")


def measure(servers: dict[str, Server], rounds: int) -> None:
    """Print every figure as Markdown; a column for each server."""
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    results: dict[tuple[int, str], list[Result]] = {}
    for round_ in range(-1, rounds):
        for name, server in servers.items():
            seconds = asyncio.run(unary(server.grpc, 40))
            latencies[name] += seconds if round_ >= 0 else []
        for streams in STREAMS:
            calls = [Call(128, 128, seed) for seed in range(streams)]
            for name, server in servers.items():
                result = asyncio.run(offer(server.grpc, calls))
                if round_ >= 0:
                    results.setdefault((streams, name), []).append(result)
    rows: dict[str, list[float]] = {}
    for percent in (50, 99):
        label = f"one token, one call at a time: ms, p{percent}"
        rows[label] = [percentile(seconds, percent) * 1e3 for seconds in latencies.values()]
    for streams in STREAMS:
        for key in ("tokens/s", "ttft p50", "itl p50", "itl p99"):
            rows[f"{streams} streams: {key}"] = [
                statistics.median(result.row()[key] for result in results[streams, name])
                for name in servers
            ]
    print("| | " + " | ".join(servers) + " |\n|" + "---|" * (1 + len(servers)))
    for label, figures in rows.items():
        print(f"| {label} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("server_flags", nargs="*")
    arguments = parser.parse_args()
    model = make_model(
        arguments.shape, Path(tempfile.gettempdir()) / f"tgis-benchmark-{arguments.shape}"
    )
    flags = ["--prefix-caching=false", *arguments.server_flags]
    with tempfile.TemporaryDirectory() as directory:
        direct = start_server(model, Path(directory), *flags, dtype="bfloat16")
        try:
            direct.wait_ready(300)
            with (
                run_on_ray(model, *flags, dtype="bfloat16") as ours,
                run_on_ray(model, *flags, dtype="bfloat16", env=SERVES_OWN) as own,
            ):
                measure({DIRECT: direct, OURS: ours, SERVES: own}, arguments.rounds)
                cost_per_token(ours)
        finally:
            direct.stop(30)


if __name__ == "__main__":
    main()
