"""What splitting a model costs and saves: memory per rank, bytes and time per step, plan broadcast.

python -m benchmarks.models M /tmp/model-m
python -m benchmarks.tensor_parallel /tmp/model-m --ranks 1 2 4
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from tgis.config import Config
from tgis.engines.base import CacheShape, Engine
from tgis.engines.native import NativeEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.rank_process import Rank, num_ranks_here, start_ranks
from tgis.engines.rank_wire import Step, ToRank
from tgis.engines.ranks import load_sharded
from tgis.engines.registry import load_engine
from tgis.engines.threads import choose_threads
from tgis.hub.headers import read_headers
from tgis.hub.resolve import resolve
from tgis.wire import frame

CONTEXT = 128
STEPS = 30
BATCHES = (1, 8, 32)
MIB = 1 << 20


def anonymous_memory(pid: int | str = "self") -> int:
    """Bytes that a process holds and shares with nobody's file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def durations_ms(run: Callable[[], object], times: int) -> list[float]:
    """Durations of calls, sorted."""
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        durations.append((time.perf_counter() - start) * 1000)
    return sorted(durations)


def median_ms(run: Callable[[], object], times: int) -> float:
    """Median duration of a call."""
    return statistics.median(durations_ms(run, times))


class Meter:
    """Adds up what a group's sums take, waiting for the slowest rank included."""

    def __init__(self, engine: NativeEngine) -> None:
        self.decoder = engine._decoder
        self.seconds = 0.0
        self.summed: list[int] = []  # bytes of each
        self.gathered: list[int] = []
        group = self.decoder.group
        sum_, gather = group.sum_, group._gather

        def timed(
            operation: Callable[..., Any], sizes: list[int], size: Callable[..., int]
        ) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                start = time.perf_counter()
                try:
                    return operation(*args)
                finally:
                    self.seconds += time.perf_counter() - start
                    sizes.append(size(*args))

            return run

        timed_sum = timed(sum_, self.summed, lambda x: x.nbytes)
        group.sum_ = timed_sum  # type: ignore[method-assign]
        group._gather = timed(gather, self.gathered, lambda x, *_: x.nbytes)  # type: ignore[method-assign]
        for block in self.decoder._blocks:
            object.__setattr__(block, "complete", timed_sum)

    def reset(self) -> None:
        self.seconds = 0.0
        self.summed.clear()
        self.gathered.clear()


def decode_plan(batch: int, position: int) -> StepPlan:
    return StepPlan([Row(i, i, [7 + i], position, Want.LAST) for i in range(batch)])


def fill(engine: Engine, batch: int) -> None:
    for row in range(batch):
        engine.forward(StepPlan([Row(row, row, list(range(1, CONTEXT + 1)), 0, Want.NOTHING)]))


def measure_steps(engine: Engine, part: NativeEngine, num_ranks: int) -> list[dict[str, Any]]:
    spec = part._decoder.spec
    meter = Meter(part) if num_ranks > 1 else None
    found = []
    for batch in BATCHES:
        fill(engine, batch)
        positions = iter(range(CONTEXT, CONTEXT + 2 * STEPS))
        engine.forward(decode_plan(batch, next(positions)))
        in_collectives: list[float] = []

        def step(batch: int = batch, positions: Any = positions, ms: Any = in_collectives) -> None:
            if meter:
                meter.reset()
            engine.forward(decode_plan(batch, next(positions)))
            if meter:
                ms.append(meter.seconds * 1000)

        steps = durations_ms(step, STEPS)
        least = 2 * spec.num_layers * batch * spec.hidden_size * part._decoder.dtype.itemsize
        result = {
            "batch": batch,
            "step_ms": [steps[0], statistics.median(steps)],
            "least_bytes": least if meter else 0,
        }
        if meter:
            result |= {
                "collectives": len(meter.summed) + len(meter.gathered),
                "summed": sum(meter.summed),
                "gathered": sum(meter.gathered),
                "collectives_ms": [min(in_collectives), statistics.median(in_collectives)],
            }
        found.append(result)
    return found


def measure_broadcast(ranks: list[Rank]) -> dict[str, float]:
    """The cost of a plan of 32 rows for the leader, which sends it, and for a rank, which reads."""
    message = Step(decode_plan(32, CONTEXT))
    decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
    body = frame(message)[4:]
    # Sent to sockets that somebody else reads, so that no rank takes part in a step.
    pairs = [socket.socketpair() for _ in ranks]
    for _, theirs in pairs:
        threading.Thread(target=drain, args=(theirs,), daemon=True).start()

    def send() -> None:
        data = frame(message)
        for ours, _ in pairs:
            ours.sendall(data)

    return {
        "bytes": len(body),
        "send_ms": median_ms(send, 300),
        "read_ms": median_ms(lambda: decoder.decode(body), 300),
    }


def drain(sock: Any) -> None:
    while sock.recv(1 << 16):
        pass


def run(path: str, num_ranks: int, dtype: str, threads: int | None) -> dict[str, Any]:
    """Load, measure, and end; in a process of its own."""
    torch.set_grad_enabled(False)
    config = Config(model_name=path, num_shard=num_ranks, dtype=dtype, threads=threads)
    files = resolve(config)
    torch.set_num_threads(choose_threads(config.threads, files, num_ranks_here(config))[0])
    before = anonymous_memory()
    ranks = start_ranks(config, files)
    if num_ranks == 1:
        engine: Any = load_engine(config, files)
        part = engine
    else:
        engine = load_sharded(config, files, ranks)
        part = engine._engine
    pids = [rank.process.pid for rank in ranks if rank.process is not None]
    memory = [anonymous_memory(pid) - before for pid in ("self", *pids)]
    engine.allocate(CacheShape(max(BATCHES), 512))
    result = {"ranks": num_ranks, "memory": memory, "steps": measure_steps(engine, part, num_ranks)}
    if ranks:
        result["broadcast"] = measure_broadcast(ranks)
    engine.close()
    return result


def weight_bytes(path: Path, dtype: str) -> tuple[int, int]:
    """Bytes of all weights, and of those that every rank holds whole, in the number type."""
    size = getattr(torch, dtype).itemsize
    total = whole = 0
    for info in read_headers(path).values():
        count = size * torch.Size(info.shape).numel()
        total += count
        whole += count if len(info.shape) == 1 else 0
    return total, whole


def pair(values: list[float]) -> str:
    """Best and median."""
    return f"{values[0]:.1f} / {values[1]:.1f}"


def show(results: list[dict[str, Any]], total: int, whole: int) -> None:
    print(f"weights {total / MIB:.1f} MiB, of which every rank holds {whole / MIB:.2f} MiB\n")
    print("| ranks | rank | memory of its part, MiB | (weights / ranks) x 1.1 + replicated, MiB |")
    print("|---|---|---|---|")
    for result in results:
        limit = (total - whole) / result["ranks"] * 1.1 + whole
        for number, grown in enumerate(result["memory"]):
            print(f"| {result['ranks']} | {number} | {grown / MIB:.1f} | {limit / MIB:.1f} |")
    print("\nTimes are best / median, in ms; sizes are KiB of each rank.\n")
    print("| ranks | rows | step | in collectives | collectives | summed | least | logits |")
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        for step in result["steps"]:
            sizes = (step.get(key, 0) / 1024 for key in ("summed", "least_bytes", "gathered"))
            print(
                f"| {result['ranks']} | {step['batch']} | {pair(step['step_ms'])}"
                f" | {pair(step.get('collectives_ms', [0, 0]))} | {step.get('collectives', 0)}"
                f" | {' | '.join(f'{size:.0f}' for size in sizes)} |"
            )
    for result in results:
        if "broadcast" in result:
            cost = result["broadcast"]
            print(
                f"\nplan of 32 rows to {result['ranks'] - 1} ranks: {cost['bytes']} bytes,"
                f" {cost['send_ms']:.3f} ms to send, {cost['read_ms']:.3f} ms to read"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="of each rank")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        (count,) = arguments.ranks
        print(json.dumps(run(arguments.model, count, arguments.dtype, arguments.threads)))
        return
    total, whole = weight_bytes(Path(arguments.model), arguments.dtype)
    results = []
    for count in arguments.ranks:
        command = [sys.executable, "-m", "benchmarks.tensor_parallel", arguments.model]
        command += ["--child", "--ranks", str(count), "--dtype", arguments.dtype]
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    show(results, total, whole)


if __name__ == "__main__":
    main()
