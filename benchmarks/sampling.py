"""Milliseconds per step of choosing tokens: `python benchmarks/sampling.py [--rows 32]`.

A step is `Sampler.sample` over one logits tensor; its median and best of `--steps` are reported for
batches in which every row has the same kind of request. Half of each row's probability lies on some
tens of tokens, as in a trained model (`--flat`: on thousands). A fresh copy of the logits is made
before each step, outside the measured time.
"""

import argparse
import time
from statistics import median

import torch

from tgis.sampling import Sampler
from tgis.types import NO_DETAILS, DetailParams, SamplingParams

FULL = DetailParams(logprobs=True, ranks=True, top_n=5, output=True)


def sampling(seed: int, **params: float) -> SamplingParams:
    return SamplingParams(do_sample=True, seed=seed, **params)  # type: ignore[arg-type]


def everything(seed: int) -> SamplingParams:
    """Each processor on, with other values in every row."""
    return sampling(
        seed,
        temperature=0.7 + 0.02 * seed,
        top_k=20 + 2 * seed,
        top_p=0.8 + 0.005 * seed,
        repetition_penalty=1.05 + 0.01 * seed,
        length_penalty_start=seed,
        length_penalty_decay=1.01,
    )


CASES = {
    "greedy": lambda seed: (SamplingParams(), NO_DETAILS),
    "greedy, logprobs + ranks + top 5": lambda seed: (SamplingParams(), FULL),
    "everything, logprobs + ranks + top 5": lambda seed: (everything(seed), FULL),
    "temperature": lambda seed: (sampling(seed, temperature=0.8), NO_DETAILS),
    "temperature, logprobs + ranks + top 5": lambda seed: (sampling(seed, temperature=0.8), FULL),
    "top-k 50": lambda seed: (sampling(seed, top_k=50), NO_DETAILS),
    "top-p 0.9": lambda seed: (sampling(seed, top_p=0.9), NO_DETAILS),
    "typical-p 0.9": lambda seed: (sampling(seed, typical_p=0.9), NO_DETAILS),
}


def make_logits(rows: int, vocab_size: int, flat: bool, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn((rows, vocab_size), generator=generator)
    if flat:
        return 3 * noise
    places = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(rows)])
    return noise - 1.3 * (places + 1).log()


def measure(
    case: str, rows: int, vocab_size: int, steps: int, prompt_tokens: int, flat: bool
) -> list[float]:
    """Milliseconds of each step."""
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(vocab_size, (2,))
    for i in range(rows):
        prompt = torch.randint(vocab_size, (prompt_tokens,), generator=generator).tolist()
        sampler.add(i, *CASES[case](i), prompt)
    logits = make_logits(rows, vocab_size, flat, generator).numpy()
    times = []
    for _ in range(steps):
        fresh = torch.from_numpy(logits.copy())
        start = time.perf_counter()
        sampler.sample(range(rows), fresh)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--flat", action="store_true")
    args = parser.parse_args()
    print(f"{args.rows} rows, vocabulary {args.vocab}: ms per step, median (best)")
    for case in CASES:
        times = measure(case, args.rows, args.vocab, args.steps, args.prompt_tokens, args.flat)
        print(f"{case:40s} {median(times):7.2f} ({min(times):.2f})")


if __name__ == "__main__":
    main()
