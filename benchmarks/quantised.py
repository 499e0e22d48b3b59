"""What quantised weights save: time of a decoding step, memory of the weights, time to load.

python -m benchmarks.quantised M
python -m benchmarks.quantised L --rows 1 --formats bf16 int8 int4

The steps are those of the native engine, without scheduling and sampling. All engines are loaded
first and take turns of some steps, so that what else the machine does meets them alike; the first
step of a turn, which finds another engine's weights in the caches, does not count.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.models import make_model
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.native import NativeEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.threads import usable_cores
from tgis.hub.headers import read_headers
from tgis.hub.quantised import write_checkpoint
from tgis.hub.safetensors import open_checkpoint
from tgis.quant.gptq import gptq_tensors
from tgis.quant.grouped import quantise

LENGTH = 192  # tokens of each row that are there already
GPTQ_GROUP = 128
TURN = 8  # steps
QUANTIZE = {
    "bf16": None,
    "int8": "int8",
    "int8-dynamic": "int8-dynamic",
    "int4": "int4",
    "gptq": None,
}


def make_gptq(source: Path, target: Path) -> Path:
    """A checkpoint in GPTQ's layout, its values the nearest: as fast as one that was calibrated."""
    if target.exists():
        return target
    checkpoint = open_checkpoint(source)

    def replacement(name: str) -> Callable[[], dict[str, torch.Tensor]]:
        def make() -> dict[str, torch.Tensor]:
            with checkpoint.tensor(name, checkpoint.info(name).shape) as stored:
                weight = quantise(stored, 4, GPTQ_GROUP)
            return gptq_tensors(name.removesuffix(".weight"), weight, "gptq")

        return make

    names = [name for name in read_headers(source) if "_proj.weight" in name]
    scheme = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": GPTQ_GROUP,
    }
    target.mkdir(parents=True)
    write_checkpoint(
        checkpoint, source, target, {name: replacement(name) for name in names}, scheme
    )
    return target


def rss_anon() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(path: Path, quantize: str | None, most_rows: int) -> NativeEngine:
    config = json.loads((path / "config.json").read_text())
    engine = native.load(path, config, torch.bfloat16, quantize=quantize)
    engine.allocate(CacheShape(most_rows, 256))
    return engine


def plan(rows: int) -> StepPlan:
    return StepPlan([Row(n, n, [5 + n], LENGTH, Want.LAST) for n in range(rows)])


def fill(engine: NativeEngine, rows: int) -> None:
    for n in range(rows):
        engine.forward(StepPlan([Row(n, n, list(range(3, 3 + LENGTH)), 0, Want.NOTHING)]))


def measure(engines: dict[str, NativeEngine], rows: int, rounds: int) -> dict[str, float]:
    """Median ms of a step of each engine."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    step = plan(rows)
    for engine in engines.values():
        engine.forward(step)
    for _ in range(rounds):
        for name, engine in engines.items():
            engine.forward(step)
            for _ in range(TURN):
                start = time.perf_counter()
                engine.forward(step)
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=["M", "L"])
    parser.add_argument("--formats", nargs="*", choices=list(QUANTIZE), default=list(QUANTIZE))
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prepare", action="store_true", help="make the checkpoints, no more")
    parser.add_argument("--directory", type=Path, help="of the checkpoints [a new one]")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())
    with directory(arguments.directory) as base, torch.inference_mode():
        path = make_model(arguments.shape, base / arguments.shape)
        gptq = path
        if "gptq" in arguments.formats:
            gptq = make_gptq(path, base / f"{arguments.shape}-gptq")
        if arguments.prepare:
            return
        engines = {}
        for name in arguments.formats:
            before, start = rss_anon(), time.perf_counter()
            engine = load(gptq if name == "gptq" else path, QUANTIZE[name], max(arguments.rows))
            seconds = time.perf_counter() - start
            print(f"{name:13} loaded in {seconds:.1f} s, {(rss_anon() - before) >> 20} MiB")
            fill(engine, max(arguments.rows))
            engines[name] = engine
        print("\n| format |" + "".join(f" {rows} rows, ms | tokens/s |" for rows in arguments.rows))
        print("|---|" + "---|---|" * len(arguments.rows))
        results = {rows: measure(engines, rows, arguments.rounds) for rows in arguments.rows}
        for name in engines:
            cells = (
                f" {results[rows][name]:.2f} | {rows / results[rows][name] * 1e3:,.0f} |"
                for rows in arguments.rows
            )
            print(f"| {name} |" + "".join(cells))


if __name__ == "__main__":
    main()
