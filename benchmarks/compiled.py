"""What PT2_COMPILE changes: the time of a step, and of a start with and without compiled code.

python -m benchmarks.compiled M --dtypes bfloat16 float32

The steps are those of the native engine, without scheduling and sampling. One engine computes them
compiled and uncompiled by turns, so that what else the machine does meets both alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.models import make_model
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.compilation import Bounds, compile_network
from tgis.engines.native import NativeEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.threads import usable_cores

LENGTH = 192  # tokens of each row that are there already
CHUNK = 512
TURN = 8  # steps
BOUNDS = Bounds(max_running=32, max_step_tokens=CHUNK, max_sequence_length=1024, kv_tokens=1 << 16)


def plans() -> dict[str, StepPlan]:
    """The steps, by name."""
    decoding = {
        f"{rows} rows": StepPlan([Row(n, n, [5 + n], LENGTH, Want.LAST) for n in range(rows)])
        for rows in (1, 8, 32)
    }
    chunk = Row(0, 0, list(range(3, 3 + CHUNK)), 0, Want.LAST)
    return decoding | {f"{CHUNK} tokens": StepPlan([chunk])}


def measure(engine: NativeEngine, plan: StepPlan, rounds: int) -> tuple[float, float]:
    """Median ms of a step, compiled and not."""
    ways = [engine._step, engine._decoder.bind(engine._cache)]  # type: ignore[arg-type]
    times: list[list[float]] = [[], []]
    turn = TURN if plan.num_tokens < CHUNK else 1
    for _ in range(rounds):
        for number, step in enumerate(ways):
            engine._step = step
            engine.forward(plan)
            for _ in range(turn):
                times[number].append(seconds(lambda: engine.forward(plan)) * 1e3)
    engine._step = ways[0]
    return statistics.median(times[0]), statistics.median(times[1])


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=["M", "L"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--model", type=Path, help="where the model is, or is put")
    parser.add_argument("--cache", help="compiled code is kept here, and is not made if it is here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        path = make_model(arguments.shape, arguments.model or Path(scratch) / "model")
        config = json.loads((path / "config.json").read_text())
        cache = arguments.cache or f"{scratch}/cache"
        for name in arguments.dtypes:
            engine = native.load(path, config, getattr(torch, name))
            engine.allocate(CacheShape(BOUNDS.max_running, BOUNDS.max_sequence_length))
            first = compile_network(engine, cache, BOUNDS)
            again = compile_network(engine, cache, BOUNDS)
            done = f"{first.seconds:.1f} s ({first.num_compiled} compiled)"
            print(f"{name}: warm-up {done}, then {again.seconds:.1f} s")
            print("| step | compiled, ms | uncompiled, ms | ratio |\n|---|---|---|---|")
            for step, plan in plans().items():
                compiled, plain = measure(engine, plan, arguments.rounds)
                ratio = plain / compiled
                print(f"| {step} | {compiled:.2f} | {plain:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
