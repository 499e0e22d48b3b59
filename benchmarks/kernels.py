"""The CPU kernels beside what they replace: `python benchmarks/kernels.py [table ...]`.

Variants of a table take turns, round by round, so that a busy machine slows all of them alike; the
medians, in microseconds, are best read as ratios. Weights are visited in rotation over more memory
than the caches hold, as in a model.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from tgis.models import kernels
from tgis.models.kernels import linear, reference

Variant = Callable[[int], object]
"""Called with the number of the round, by which it picks its weights."""

BF16 = torch.bfloat16
COLD_BYTES = 400_000_000


def take_turns(variants: dict[str, Variant], rounds: int) -> dict[str, float]:
    """Median microseconds of each variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant(i)
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: median(values) for name, values in times.items()}


def show(label: str, results: dict[str, float]) -> None:
    print(f"{label:30}" + "".join(f"{name} {value:,.0f}   " for name, value in results.items()))


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Batch:
    """Sequences in the middle of their lives: (new tokens, length) of each."""

    def __init__(self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int) -> None:
        self.lengths = lengths
        shape = (len(lengths), kv_heads, max(length for _, length in lengths), dim)
        self.k, self.v = torch.randn(shape).to(BF16), torch.randn(shape).to(BF16)
        starts = [0, *itertools.accumulate(new for new, _ in lengths)]
        self.q = torch.randn(starts[-1], heads, dim).to(BF16)
        self.q_start, self.kv_len = int32(starts), int32([length for _, length in lengths])
        self.slots = int32(list(range(len(lengths))))
        self.scale = dim**-0.5
        self.group = heads // kv_heads

    def kernel(self, _: int = 0) -> Tensor:
        return kernels.attention(
            self.q, self.k, self.v, self.slots, self.q_start, self.kv_len, self.scale
        )

    def padded_sdpa(self, _: int) -> Tensor:
        """One call for all sequences; query heads as rows of their KV head. Decoding only."""
        longest = self.k.shape[2]
        seen = torch.arange(longest) < self.kv_len[:, None]
        q = self.q.view(len(self.lengths), -1, self.group, self.q.shape[2])
        return functional.scaled_dot_product_attention(
            q, self.k, self.v, attn_mask=seen[:, None, None]
        )

    def sdpa(self, _: int) -> None:
        """A call per sequence on views of its rows."""
        for s, (new, length) in enumerate(self.lengths):
            q = self.q[self.q_start[s] : self.q_start[s + 1]].transpose(0, 1)[None]
            k, v = self.k[s : s + 1, :, :length], self.v[s : s + 1, :, :length]
            mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
            attn_mask = mask if new > 1 else None
            functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=True)

    def matmuls(self, _: int) -> None:
        """matmul, softmax, matmul per sequence. Decoding only."""
        for s, (_, length) in enumerate(self.lengths):
            q = self.q[s].view(self.k.shape[1], self.group, -1)
            weights = (q @ self.k[s, :, :length].mT * self.scale).softmax(-1)
            weights @ self.v[s, :, :length]


def attention_table() -> None:
    print("\nAttention of one layer, us (decoding rows, then chunks of prompts)")
    model_m = (12, 4, 64)
    decoding = {
        "32 x 192": [(1, 192)] * 32,
        "32 x 16..768": [(1, 16 + 24 * i) for i in range(32)],
        "1 x 192": [(1, 192)],
        "1 x 2048": [(1, 2048)],
    }
    for name, lengths in decoding.items():
        b = Batch(lengths, *model_m)
        variants: dict[str, Variant] = {
            "ours": b.kernel,
            "SDPA padded, grouped": b.padded_sdpa,
            "SDPA per sequence": b.sdpa,
            "matmuls": b.matmuls,
        }
        results = take_turns(variants, 40)
        bytes_read = sum(length for _, length in lengths) * 4 * 64 * 4
        show(f"{name} ({bytes_read / results['ours'] / 1e3:.0f} GB/s)", results)
    for new, cached in [(16, 0), (128, 0), (512, 0), (512, 512), (512, 2048), (64, 1000)]:
        b = Batch([(new, new + cached)], *model_m)
        show(f"{new} new after {cached}", take_turns({"ours": b.kernel, "SDPA": b.sdpa}, 20))
    b = Batch([(1, 300)] * 31 + [(256, 512)], *model_m)
    show("31 decoding + 256 new", take_turns({"ours": b.kernel, "SDPA": b.sdpa}, 20))


def linear_variants(in_features: int, out_features: int) -> dict[str, Callable[..., object]]:
    """Functions of (round, x, x quantised)."""
    copies = COLD_BYTES // (in_features * out_features * 6)
    weight = (torch.randn(out_features, in_features) * 0.05).to(BF16)
    q, scale = kernels.quantize_rows(weight)
    zeros = torch.zeros(out_features, dtype=torch.int32)
    ours = [linear.bf16_linear(weight) for _ in range(copies)]
    ours8 = [linear.int8_linear(weight) for _ in range(copies)]
    blocked = [torch.ops.mkldnn._reorder_linear_weight(weight, 32) for _ in range(copies)]
    blocked8 = [torch.ops.onednn.qlinear_prepack(q, None) for _ in range(copies)]
    multiply = torch.ops.mkldnn._linear_pointwise.default
    multiply8 = torch.ops.onednn.qlinear_pointwise.default

    def onednn8(i: int, x: Tensor, x8: Tensor) -> Tensor:
        return multiply8(
            *(x8, 1.0, 0, blocked8[i % copies], scale, zeros),
            *(None, 1.0, 0, BF16, "none", [], ""),
        )

    return {
        "ours bf16": lambda i, x, x8: ours[i % copies](x),
        "oneDNN bf16": lambda i, x, x8: multiply(x, blocked[i % copies], None, "none", [], ""),
        "ours int8": lambda i, x, x8: ours8[i % copies](x),
        "oneDNN int8 (x quantised)": onednn8,
    }


def linear_table() -> None:
    print("\nLinear layers, us (in x out, rows)")
    for in_features, out_features in [(768, 1280), (768, 4096), (2048, 768), (2048, 5632)]:
        functions = linear_variants(in_features, out_features)
        for rows in (1, 8, 32, 128, 512):
            x = torch.randn(rows, in_features).to(BF16)
            x8 = kernels.quantize_rows(x)[0]
            results = take_turns(
                {name: partial(f, x=x, x8=x8) for name, f in functions.items()}, 60
            )
            speed = in_features * out_features * 2 / results["ours bf16"] / 1e3
            show(f"{in_features} x {out_features}, {rows:3} ({speed:.0f} GB/s)", results)


def small_table() -> None:
    print("\nSmall operators, us, hidden 768, MLP 2048 (C, then PyTorch)")
    for rows in (1, 8, 32, 512):
        x, residual = torch.randn(rows, 768).to(BF16), torch.randn(rows, 768).to(BF16)
        weight, gate_up = torch.ones(768, dtype=BF16), torch.randn(rows, 4096).to(BF16)
        k = torch.zeros(rows, 4, 16, 64, dtype=BF16)
        v, qkv, angle = torch.zeros_like(k), torch.randn(rows, 1280).to(BF16), torch.rand(rows, 32)
        slots, places = torch.arange(rows).int(), torch.zeros(rows).int()
        logits = torch.randn(rows, 32_000)
        calls: dict[str, tuple[object, ...]] = {
            "rms_norm": (x, weight, 1e-6, residual),
            "rope_store": (qkv, angle, angle, k, v, slots, places, 12, 4),
            "act_mul": (gate_up, "silu"),
            "quantize_rows": (x,),
            "argmax": (logits,),
        }
        for name, arguments in calls.items():
            variants = {
                module.__name__.rpartition(".")[2]: partial(
                    lambda _, module, name, arguments: getattr(module, name)(*arguments),
                    module=module,
                    name=name,
                    arguments=arguments,
                )
                for module in (kernels, reference)
            }
            show(f"{name}, {rows} rows", take_turns(variants, 100))


class Model:
    """One decoding step of model M, built from the kernels; each operator's time can be summed."""

    layers, hidden, mlp, heads, kv_heads, dim, vocab = 12, 768, 2048, 12, 4, 64, 32_000

    def __init__(self, make: Callable[[Tensor], linear.Linear]) -> None:
        def layer(out: int, width: int) -> linear.Linear:
            return make((torch.randn(out, width) * width**-0.5).to(BF16))

        self.blocks = [
            (
                layer((self.heads + 2 * self.kv_heads) * self.dim, self.hidden),
                layer(self.hidden, self.heads * self.dim),
                layer(2 * self.mlp, self.hidden),
                layer(self.hidden, self.mlp),
            )
            for _ in range(self.layers)
        ]
        self.head = layer(self.vocab, self.hidden)
        self.embedding = torch.randn(self.vocab, self.hidden).to(BF16)
        self.norm = torch.ones(self.hidden, dtype=BF16)

    def prepare(self, rows: int, length: int) -> None:
        shape = (self.layers, rows, self.kv_heads, 1024, self.dim)
        self.k, self.v = torch.randn(shape).to(BF16), torch.randn(shape).to(BF16)
        self.slots, self.kv_len = int32(list(range(rows))), int32([length] * rows)
        self.q_start, self.places = int32(list(range(rows + 1))), int32([length - 1] * rows)
        self.inputs = (
            self.embedding[torch.randint(self.vocab, (rows,))],
            torch.rand(rows, self.dim // 2),
        )

    def step(self, stream: Tensor, angle: Tensor, times: dict[str, float] | None = None) -> Tensor:
        """The step; `times` sums what each operator takes."""

        def run(name: str, function: Callable[..., Tensor], *arguments: object) -> Tensor:
            if times is None:
                return function(*arguments)
            start = time.perf_counter()
            result = function(*arguments)
            times[name] = times.get(name, 0.0) + time.perf_counter() - start
            return result

        added = None
        for i, (qkv, out, gate_up, down) in enumerate(self.blocks):
            x = run("norm", kernels.rms_norm, stream, self.norm, 1e-5, added)
            x = run("linear", qkv, x)
            position = (self.slots, self.places, self.heads, self.kv_heads)
            q = run(
                *("rope_store", kernels.rope_store, x, angle, angle),
                *(self.k[i], self.v[i], *position),
            )
            index = (self.slots, self.q_start, self.kv_len, self.dim**-0.5)
            x = run("attention", kernels.attention, q, self.k[i], self.v[i], *index)
            x = run("linear", out, x)
            x = run("norm", kernels.rms_norm, stream, self.norm, 1e-5, x)
            x = run("linear", gate_up, x)
            x = run("act_mul", kernels.act_mul, x, "silu")
            added = run("linear", down, x)
        x = run("norm", kernels.rms_norm, stream, self.norm, 1e-5, added)
        return run("argmax", kernels.argmax, run("head", self.head, x))


def step_table() -> None:
    print("\nOne decoding step of model M at length 192, ms, and where it goes")
    for name, make in {"bf16": linear.bf16_linear, "int8": linear.int8_linear}.items():
        model = Model(make)
        replayed = kernels.replayed(model.step)
        for rows in (1, 8, 32):
            model.prepare(rows, 192)
            variants: dict[str, Variant] = {
                "python": lambda _, model=model: model.step(*model.inputs),
                "replayed": lambda _, model=model, replayed=replayed, rows=rows: replayed(
                    rows, *model.inputs
                ),
            }
            results = take_turns(variants, 40)
            times: dict[str, float] = {}
            for _ in range(20):
                model.step(*model.inputs, times)
            parts = "  ".join(f"{key} {value / 20 * 1e3:.2f}" for key, value in times.items())
            whole = "  ".join(f"{key} {value / 1e3:.2f}" for key, value in results.items())
            speed = rows / results["replayed"] * 1e6
            print(f"{name} {rows:3} rows: {whole} = {speed:.0f} tokens/s;  python's: {parts}")


def mixed_table() -> None:
    """What a batch of mixed lengths costs beside one of the same bytes in equal lengths."""
    print("\nAttention of one layer from memory, us: mixed lengths beside equal ones, same bytes")
    mixed = [16 + round((2048 - 16) * i / 31) for i in range(32)]
    equal = [sum(mixed) // 32] * 32
    copies = COLD_BYTES // (sum(mixed) * 4 * 64 * 4)
    batches = {
        name: [Batch([(1, n) for n in lengths], 12, 4, 64) for _ in range(copies)]
        for name, lengths in {"16..2048": mixed, "all 1032": equal}.items()
    }
    variants: dict[str, Variant] = {
        name: lambda i, made=made: made[i % copies].kernel() for name, made in batches.items()
    }
    results = take_turns(variants, 40)
    ratio = results["16..2048"] / results["all 1032"]
    show(f"32 sequences: {ratio:.2f} times", results)


TABLES = {
    "attention": attention_table,
    "mixed": mixed_table,
    "linear": linear_table,
    "small": small_table,
    "step": step_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{kernels.describe()}, {arguments.threads} threads")
    with torch.inference_mode():
        for name in arguments.tables or TABLES:
            TABLES[name]()


if __name__ == "__main__":
    main()
