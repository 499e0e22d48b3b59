"""What a workload gave, and what the machine could give at most."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.load import Call, percentile


@dataclass(frozen=True)
class Figures:
    """Of one run of a workload; milliseconds, NaN where a peer cannot tell."""

    rate: float  # generated tokens per second; prompt tokens where one token is generated
    ttft: float  # median
    itl_p50: float
    itl_p99: float

    @classmethod
    def of(
        cls, calls: Sequence[Call], seconds: float, first: list[float], gaps: list[float]
    ) -> "Figures":
        """From times in seconds."""
        only_prompts = all(call.new_tokens == 1 for call in calls)
        tokens = sum(call.prompt_tokens if only_prompts else call.new_tokens for call in calls)
        nan = [float("nan")]
        return cls(
            tokens / seconds,
            median(first or nan) * 1e3,
            percentile(gaps or nan, 50) * 1e3,
            percentile(gaps or nan, 99) * 1e3,
        )

    @classmethod
    def median(cls, runs: Sequence["Figures"]) -> "Figures":
        """Each figure's median."""
        return cls(*(median(values) for values in zip(*(asdict(r).values() for r in runs))))  # noqa: B905


@dataclass(frozen=True)
class Machine:
    """Best rates seen with PyTorch's own operators on all threads."""

    bandwidth: float  # bytes read per second
    bf16: float  # floating-point operations per second
    int8: float

    @classmethod
    def measure(cls) -> "Machine":
        """A few seconds of reading and multiplying."""
        data = torch.ones(1 << 27, dtype=torch.int64)  # 1 GiB
        x = torch.randn(1024, 2048).bfloat16()
        weight = torch.randn(5632, 2048).bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
        linear = torch.ops.mkldnn._linear_pointwise
        bf16 = _best(lambda: linear(x, packed, None, "none", [], ""))
        operations = 2 * x.shape[0] * weight.numel()
        return cls(
            data.nbytes / _best(data.sum), operations / bf16, operations / _best(_int8_linear())
        )


def _int8_linear() -> Callable[[], object]:
    x = torch.randint(0, 255, (1024, 2048), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (5632, 2048), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [1024, 2048])
    scales = torch.ones(5632)
    zeros = torch.zeros(5632, dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )


def _best(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(15):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def roofline(machine: Machine, model: Path, precision: str, calls: Sequence[Call]) -> float:
    """Tokens per second if each step took only the longer of its reading and its arithmetic.

    All prompts first, then steps of all calls that still have tokens to come. The cache is bf16.
    """
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    per_layer = hidden * (2 * hidden + 2 * kv + 3 * config["intermediate_size"])
    head = hidden * config["vocab_size"]
    width, rate = (1, machine.int8) if precision == "int8" else (2, machine.bf16)

    def step(tokens: int, context: int, logits: int) -> float:
        body = layers * per_layer
        reading = (body + head) * width + context * layers * 2 * kv * 2
        return max(reading / machine.bandwidth, 2 * (body * tokens + head * logits) / rate)

    prompt = sum(call.prompt_tokens for call in calls)
    seconds = step(prompt, prompt, len(calls))
    for number in range(1, max(call.new_tokens for call in calls)):
        alive = [call for call in calls if call.new_tokens > number]
        context = sum(call.prompt_tokens + number for call in alive)
        seconds += step(len(alive), context, len(alive))
    only_prompts = all(call.new_tokens == 1 for call in calls)
    return (prompt if only_prompts else sum(call.new_tokens for call in calls)) / seconds
