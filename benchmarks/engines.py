"""The engines on one model and machine: tokens a second of one sequence and of eight.

    python -m benchmarks.engines --shape M --onnx DIRECTORY

Steps of the engines alone, without a server, taken in turns. `DIRECTORY` gets the model's ONNX
files if it has none. What ONNX Runtime computes is float32, so all are measured in it, and those
that can in bfloat16 too.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.models import SHAPES, VOCAB, make_model
from tgis.config import Config
from tgis.engines.base import CacheShape, Engine
from tgis.engines.onnx_export import Options, export
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.registry import GENERAL, NATIVE, load_engine
from tgis.hub.resolve import resolve

STREAMS = (1, 8)
PROMPT, NEW = 128, 32
ROUNDS = 2
KINDS = [
    (NATIVE, "float32"),
    ("hf_optimum_ort", "float32"),
    ("ibm_fms", "float32"),
    (GENERAL, "float32"),
    (NATIVE, "bfloat16"),
    ("ibm_fms", "bfloat16"),
    (GENERAL, "bfloat16"),
]


def engine_of(model: Path, name: str, dtype: str) -> Engine:
    """A loaded engine with room for all streams."""
    config = Config(model_name=str(model), deployment_framework=name, dtype=dtype)
    engine = load_engine(config, resolve(config))
    engine.allocate(CacheShape(max(STREAMS), 256))
    return engine


def seconds(engine: Engine, streams: int) -> tuple[float, float]:
    """Of the prompts' step, and of all the others."""
    rng = random.Random(streams)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(PROMPT)] for _ in range(streams)]
    start = time.perf_counter()
    tokens = step(engine, [(prompt, 0) for prompt in prompts])
    first = time.perf_counter()
    for position in range(PROMPT, PROMPT + NEW - 1):
        tokens = step(engine, [([token], position) for token in tokens])
    end = time.perf_counter()
    engine.release(range(streams))
    return first - start, end - first


def step(engine: Engine, rows: Iterable[tuple[list[int], int]]) -> list[int]:
    """The next token of every row."""
    plan = [Row(slot, slot, ids, start, Want.LAST) for slot, (ids, start) in enumerate(rows)]
    chosen: list[int] = engine.forward(StepPlan(plan)).argmax(dim=1).tolist()
    return chosen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="M")
    parser.add_argument("--onnx", type=Path, required=True)
    arguments = parser.parse_args()
    name = f"tgis-benchmark-{arguments.shape}"
    model = make_model(arguments.shape, Path(tempfile.gettempdir()) / name)
    if not arguments.onnx.exists():
        export(Config(model_name=str(model)), arguments.onnx, Options(), print)
    engines = {
        (kind, dtype): engine_of(arguments.onnx if kind == "hf_optimum_ort" else model, kind, dtype)
        for kind, dtype in KINDS
    }
    best: dict[tuple[str, str, int], tuple[float, float]] = {}
    for _ in range(1 + ROUNDS):
        for key, engine in engines.items():
            for streams in STREAMS:
                found = seconds(engine, streams)
                old = best.get((*key, streams), found)
                best[*key, streams] = (min(old[0], found[0]), min(old[1], found[1]))
    print(f"{arguments.shape}, {torch.get_num_threads()} threads; tokens/s, and ms of the prompts")
    print("| engine | type |" + "".join(f" {n} | prompt |" for n in STREAMS))
    print("|---|---|" + "---|---|" * len(STREAMS))
    for kind, dtype in KINDS:
        cells = [best[kind, dtype, streams] for streams in STREAMS]
        figures = (
            f" {streams * (NEW - 1) / rest:.1f} | {prompt * 1e3:.0f} |"
            for streams, (prompt, rest) in zip(STREAMS, cells, strict=True)
        )
        print(f"| `{kind}` | {dtype} |" + "".join(figures))


if __name__ == "__main__":
    main()
