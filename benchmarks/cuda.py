"""The native engine on one CUDA device against what the device can do, and against Transformers.

    python -m benchmarks.cuda [--layers 32] [--attention flex] [--dtype bfloat16]

A random model of LLaMA-7B's shape is served by the core (scheduler, engine, sampler) in this
process. The bounds come from the device itself: the bandwidth of a large copy, and the rate of a
large matrix product. Printed are tokens/s and the share of the bound, beside what is claimed:

    1 stream     prompt 128, 128 new    60 % of reading weights and cache once a token
    64 streams   prompt 128, 128 new    45 % of that mix's bound; the device busy for 95 % of it
    prefill      4,096 tokens           50 % of the matrix rate
    64 mixed     prompts 16 to 512      4 times `transformers.generate` (SDPA, one static batch)

It needs 30 GB of device memory and of disk for 32 layers. Nothing here has been run so far.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks.families import Link, Pulse, Served
from tgis.config import Config
from tgis.control import Boot
from tgis.core.assembly import assemble
from tgis.hub.resolve import resolve
from tgis.types import NO_DETAILS, SamplingParams
from tgis.wire import Add

CLAIMS = {"1 stream": 0.60, "64 streams": 0.45, "prefill": 0.50, "64 mixed": 4.0, "busy": 0.95}
PROMPT, NEW, LONG, STREAMS = 128, 128, 4096, 64
ROUNDS = 3
NO_DEVICE = (
    "benchmarks.cuda needs a CUDA device that PyTorch can use, and there is none here: nothing was"
    " measured. docs/cuda.md says how to judge a card."
)


class Bounds(NamedTuple):
    """What a device can do, measured."""

    bandwidth: float  # bytes/s, read and written
    rate: float  # floating-point operations/s of a product of bfloat16 matrices


class Shape(NamedTuple):
    """What of a model decides how long a step must take."""

    num_weights: int  # that every token is multiplied by
    weight_bytes: int
    kv_bytes: int  # of one token


def shape_of(config: Any, itemsize: int) -> Shape:
    """Of a LLaMA configuration; embeddings are only looked up."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    weights = config.num_hidden_layers * layer + config.vocab_size * hidden
    return Shape(weights, weights * itemsize, 2 * config.num_hidden_layers * kv * itemsize)


def step_seconds(bounds: Bounds, shape: Shape, num_tokens: int, kv_tokens: int) -> float:
    """The least that a step can take: by what it reads, or by what it multiplies."""
    read = (shape.weight_bytes + kv_tokens * shape.kv_bytes) / bounds.bandwidth
    return max(read, 2 * shape.num_weights * num_tokens / bounds.rate)


def mix_seconds(bounds: Bounds, shape: Shape, streams: int, prompt: int, new: int) -> float:
    """The least that streams can take that begin together: all prompts, then step after step."""
    prefill = step_seconds(bounds, shape, streams * prompt, streams * prompt)
    lengths = range(prompt + 1, prompt + new)
    return prefill + sum(step_seconds(bounds, shape, streams, streams * n) for n in lengths)


def measure_bounds() -> Bounds:
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copying = best_seconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplying = best_seconds(lambda: a @ b)
    return Bounds(2 * source.numel() / copying, 2 * 8192**3 / multiplying)


def best_seconds(run: Callable[[], object], rounds: int = 10) -> float:
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def save_model(path: Path, layers: int, dtype: torch.dtype) -> transformers.LlamaConfig:
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, max_position_embeddings=8192, eos_token_id=None, pad_token_id=0
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return config


def serve(path: Path, dtype: str, attention: str | None) -> Served:
    config = Config(
        model_name=str(path),
        deployment_framework="tgis_native",
        device="cuda",
        attention=attention,  # type: ignore[arg-type]
        dtype=dtype,
        max_sequence_length=LONG + 1,
        max_new_tokens=1024,
        max_batch_size=STREAMS,
        max_step_tokens=LONG,
        prefix_caching=False,
    )
    link: Any = Link()
    core, _ = assemble(Boot(config, resolve(config), "", ""), link, Pulse(), lambda *_: None, [])
    return Served(core, link)


Load = Sequence[tuple[int, int]]
"""(tokens of the prompt, new tokens) of requests that come together"""


def offer(served: Served, load: Load, rng: random.Random) -> float:
    """Seconds from the first step to the last token."""
    for number, (prompt, new) in enumerate(load):
        ids = [rng.randrange(10, 32_000) for _ in range(prompt)]
        add = Add(number, ids, SamplingParams(), NO_DETAILS, new, float("inf"), time.monotonic())
        served.link.requests.append(add)
    served.link.num_open += len(load)
    torch.cuda.synchronize()
    start = time.perf_counter()
    while served.link.num_open:
        served.core.turn(0.0)
    return time.perf_counter() - start


def busy_share(served: Served, load: Load, rng: random.Random) -> float:
    """The part of the time in which some kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = offer(served, load, rng)
    kernels = (event.self_device_time_total for event in profiler.key_averages())
    return sum(kernels) / 1e6 / seconds


def mixed_load(rng: random.Random) -> Load:
    return [(rng.randrange(16, 513), rng.randrange(8, 257)) for _ in range(STREAMS)]


def generate_seconds(path: Path, load: Load, dtype: torch.dtype) -> float:
    """`transformers.generate` on all at once, padded; it goes on until the longest has ended."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map="cuda", attn_implementation="sdpa"
    )
    longest = max(prompt for prompt, _ in load)
    ids = torch.randint(10, 32_000, (len(load), longest), device="cuda")
    places = torch.arange(longest, device="cuda")
    begin = longest - torch.tensor([prompt for prompt, _ in load], device="cuda")
    mask = (places >= begin[:, None]).long()
    new = max(new for _, new in load)
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    return best_seconds(
        lambda: model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options), rounds=2
    )


def measure(path: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    shape = shape_of(save_model(path, arguments.layers, dtype), dtype.itemsize)
    bounds, rng = measure_bounds(), random.Random(0)
    found = {"device": {"GB/s": bounds.bandwidth / 1e9, "TFLOP/s": bounds.rate / 1e12}}
    served = serve(path, arguments.dtype, arguments.attention)
    for name, streams in (("1 stream", 1), (f"{STREAMS} streams", STREAMS)):
        load = [(PROMPT, NEW)] * streams
        seconds = min(offer(served, load, rng) for _ in range(ROUNDS))
        share = mix_seconds(bounds, shape, streams, PROMPT, NEW) / seconds
        found[name] = {"tokens/s": streams * NEW / seconds, "share": share}
    seconds = min(offer(served, [(LONG, 1)], rng) for _ in range(ROUNDS))
    share = 2 * shape.num_weights * LONG / bounds.rate / seconds
    found["prefill"] = {"tokens/s": LONG / seconds, "share": share}
    found["busy"] = {"share": busy_share(served, [(PROMPT, NEW)] * STREAMS, rng)}
    load = mixed_load(rng)
    seconds = min(offer(served, load, rng) for _ in range(ROUNDS))
    del served
    torch.cuda.empty_cache()
    ratio = generate_seconds(path, load, dtype) / seconds
    found["64 mixed"] = {"tokens/s": sum(new for _, new in load) / seconds, "ratio": ratio}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| | tokens/s | share of the bound, or ratio | claimed |", "|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        row = found[name]
        value = row.get("share", row.get("ratio", 0.0))
        short = "" if value >= claim else " (short)"
        speed = f"{row['tokens/s']:,.0f}" if "tokens/s" in row else ""
        lines.append(f"| {name} | {speed} | {value:.2f}{short} | {claim:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--attention", help="back end; default: as a server's")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as path:
        found = measure(Path(path), arguments)
    print(f"{torch.cuda.get_device_name()}: {found['device']}\n\n{table(found)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
