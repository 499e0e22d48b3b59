"""Probes of a server at full load: how long `/health` and grpc.health.v1 take to answer.

    python -m benchmarks.health [--shape M] [-- server flags]

Probes come every 20 ms, HTTP ones on a new connection each, as a kubelet's do, while 64 requests of
mixed lengths (workload W3) and long prompts keep the server busy. The claim: at most 50 ms.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.kit.server import Server, start_server

from benchmarks.load import Call, offered, percentile, workloads
from benchmarks.models import SHAPES, make_model

PAUSE = 0.02
SETTLE = 1.0


def load(address: str) -> None:
    """Full load, in a process of its own."""
    prompts = [Call(1024, 8, 1000 + seed) for seed in range(16)]
    offered(address, [*workloads()["W3"], *prompts])


def probe(server: Server, busy: Callable[[], bool]) -> dict[str, list[float]]:
    """Milliseconds of each probe."""
    found: dict[str, list[float]] = {"GET /health": [], "Health/Check": []}
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def check() -> None:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

        def get() -> None:
            assert server.get("/health")[0] == 200

        check()
        while busy():
            for name, ask in (("GET /health", get), ("Health/Check", check)):
                start = time.perf_counter()
                ask()
                found[name].append((time.perf_counter() - start) * 1e3)
            time.sleep(PAUSE)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("server_flags", nargs="*")
    arguments = parser.parse_args()
    cache = Path(tempfile.gettempdir()) / f"tgis-benchmark-{arguments.shape}"
    model = make_model(arguments.shape, cache)
    with tempfile.TemporaryDirectory() as directory:
        flags = arguments.server_flags
        server = start_server(model, Path(directory), *flags, dtype=arguments.dtype)
        try:
            server.wait_ready(300)
            client = multiprocessing.get_context("spawn").Process(target=load, args=(server.grpc,))
            client.start()
            time.sleep(SETTLE)
            found = probe(server, client.is_alive)
            client.join()
        finally:
            server.stop(30)
    print("| probe | count | p50, ms | p99, ms | most, ms |")
    print("|---|---|---|---|---|")
    for name, times in found.items():
        figures = (percentile(times, 50), percentile(times, 99), max(times))
        print(f"| {name} | {len(times)} | " + " | ".join(f"{x:.1f}" for x in figures) + " |")


if __name__ == "__main__":
    main()
