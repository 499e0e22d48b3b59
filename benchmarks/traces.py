"""Request traces for the scheduler's simulator: when requests come, how long they are."""

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request of a trace."""

    time: float  # seconds
    prompt: list[int]
    num_output: int  # tokens after which the model ends it
    max_new_tokens: int  # that it asks for


def _log_normal(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(median * math.exp(sigma * rng.gauss(0.0, 1.0)))))


def _unique(number: int, length: int) -> list[int]:
    """Tokens that no other request of the trace begins with."""
    start = number << 12 & 0x7FFFFFFF
    return list(range(start, start + length))


def _chat(rng: random.Random, number: int) -> tuple[list[int], int, int]:
    """Prompts around 150 tokens, answers around 100; some clients know how many, most do not."""
    length = _log_normal(rng, 150, 0.9, 1400)
    output = _log_normal(rng, 100, 0.7, 512)
    return _unique(number, length), output, rng.choice((output, min(512, 2 * output), 512))


def _short(rng: random.Random, number: int) -> tuple[list[int], int, int]:
    """Classification: short prompts, a few tokens of answer."""
    output = rng.randint(1, 16)
    return _unique(number, rng.randint(16, 96)), output, output


def _shared(rng: random.Random, number: int) -> tuple[list[int], int, int]:
    """One of eight system prompts of 400 tokens, then a question."""
    system = range(1 << 28, (1 << 28) + 400)
    which = rng.randrange(8)
    question, output = _log_normal(rng, 60, 0.6, 400), _log_normal(rng, 60, 0.6, 256)
    return [which + 8 * token for token in system] + _unique(number, question), output, 256


def _giants(rng: random.Random, number: int) -> tuple[list[int], int, int]:
    """Mostly tiny requests, and every hundredth one that fills much of the pool."""
    if number % 100 == 50:
        return _unique(number, 1500), 400, 500
    output = rng.randint(1, 40)
    return _unique(number, rng.randint(8, 64)), output, output


KINDS: dict[str, Callable[[random.Random, int], tuple[list[int], int, int]]] = {
    "chat": _chat,
    "short": _short,
    "shared": _shared,
    "giants": _giants,
}


def trace(kind: str, num_requests: int, rate: float, burst: int, seed: int) -> Iterator[Arrival]:
    """Requests of one kind.

    Args:
        rate: mean requests a second; bursts come as a Poisson process.
        burst: requests that come at once.
    """
    rng = random.Random(seed)
    make = KINDS[kind]
    now = 0.0
    for number in range(num_requests):
        if number % burst == 0:
            now += rng.expovariate(rate / burst)
        yield Arrival(now, *make(rng, number))
