"""What LoRA costs a full batch: steps with adapters on all projections against plain ones.

python -m benchmarks.models M /tmp/model-m
python -m benchmarks.lora /tmp/model-m --adapters 8 --rank 16
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tgis.adapters.lora import Lora
from tgis.engines import native
from tgis.engines.base import CacheShape, Engine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models.dtypes import choose_dtype

ROWS = 32
CONTEXT = 128
CHUNK = 512


def random_lora(engine: Engine, rank: int, dtype: torch.dtype, seed: int) -> Lora:
    """An adapter of all projections of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    assert engine.caps.lora_targets is not None
    targets = {t.name: t for t in engine.caps.lora_targets.values() if t.sample is None}
    pairs = {}
    for name, target in targets.items():
        a = torch.randn(rank, target.in_features, generator=generator)
        b = torch.randn(target.out_features, rank, generator=generator)
        scale = 0.1 * (rank * target.in_features) ** -0.5
        pairs[name] = (a.to(dtype), (b * scale).to(dtype))
    return Lora(pairs)


class Batch:
    """Rows that decode, a token each in every step."""

    def __init__(self, engine: Engine, handles: list[int]) -> None:
        self._engine = engine
        self._handles = handles
        self._at = CONTEXT
        for row, handle in enumerate(handles):
            ids = list(range(1, CONTEXT + 1))
            engine.forward(StepPlan([Row(row, row, ids, 0, Want.NOTHING, lora=handle)]))

    def step(self) -> float:
        """Milliseconds of a step."""
        rows = [
            Row(n, n, [7 + n], self._at, Want.LAST, lora=handle)
            for n, handle in enumerate(self._handles)
        ]
        start = time.perf_counter()
        self._engine.forward(StepPlan(rows))
        self._at += 1
        return (time.perf_counter() - start) * 1e3


def prefill_ms(engine: Engine, handle: int) -> float:
    """Milliseconds of a chunk of a prompt."""
    row = Row(0, 0, list(range(1, CHUNK + 1)), 0, Want.LAST, lora=handle)
    start = time.perf_counter()
    engine.forward(StepPlan([row]))
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, _ = choose_dtype(arguments.dtype)
    config = json.loads((arguments.model / "config.json").read_text())
    engine = native.load(arguments.model, config, dtype)
    engine.allocate(CacheShape(2 * ROWS, CONTEXT + CHUNK + 2 * arguments.steps + 10))
    attached = []
    for handle in range(1, arguments.adapters + 1):
        lora = random_lora(engine, arguments.rank, dtype, handle)
        start = time.perf_counter()
        engine.attach(handle, lora)
        attached.append((time.perf_counter() - start) * 1e3)
    batches = {
        "plain": [0] * ROWS,
        "one adapter": [1] * ROWS,
        "adapters": [1 + n % arguments.adapters for n in range(ROWS)],
        "one row of 32": [1] + [0] * (ROWS - 1),
    }
    found: dict[str, list[float]] = {name: [] for name in batches}
    rounds = 4
    for _ in range(rounds):  # by turns: the machine may change meanwhile
        for name, handles in batches.items():
            batch = Batch(engine, handles)
            batch.step()
            found[name] += [batch.step() for _ in range(arguments.steps // rounds)]
    plain = statistics.median(found["plain"])
    print(f"{ROWS} rows, {arguments.adapters} adapters of rank {arguments.rank},", end=" ")
    print(f"{lora.num_bytes / 2**20:.1f} MiB each; {dtype}, {torch.get_num_threads()} threads")
    for name, durations in found.items():
        ms = statistics.median(durations)
        print(f"{name:14} {ms:7.2f} ms a step, {plain / ms:6.1%} of plain throughput")
    for handle in (0, 1):
        ms = statistics.median(prefill_ms(engine, handle) for _ in range(7))
        print(f"{CHUNK} tokens of a prompt {'with' if handle else 'without'} one: {ms:.1f} ms")
    print(f"attaching one: {statistics.median(attached):.1f} ms")


if __name__ == "__main__":
    main()
