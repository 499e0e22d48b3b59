"""Offering load to a server over gRPC, and what came of it."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import uvloop

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

# Long enough that truncation sets the length of every prompt exactly.
_WORDS = "the little dog ran to the big tree and saw a small red bird with a happy friend"


@dataclass(frozen=True)
class Call:
    """One request: exact lengths, greedy."""

    prompt_tokens: int
    new_tokens: int
    seed: int = 0

    def message(self) -> pb.SingleGenerationRequest:
        """The request; prompts of different seeds share no beginning."""
        words = _WORDS.split()
        rng = random.Random(self.seed)
        text = " ".join(rng.choice(words) for _ in range(2 * self.prompt_tokens + 16))
        stopping = pb.StoppingCriteria(
            max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
        )
        params = pb.Parameters(
            stopping=stopping,
            truncate_input_tokens=self.prompt_tokens,
            # A message for every token: random weights often generate no text that can be shown.
            response=pb.ResponseOptions(generated_tokens=True),
        )
        return pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), params=params)


@dataclass
class Trace:
    """What one request saw; times in seconds."""

    first: float = 0.0  # from sending to the first token
    gaps: list[float] = field(default_factory=list)  # between tokens
    tokens: int = 0
    end: float = 0.0


@dataclass
class Result:
    """What a whole workload saw."""

    traces: list[Trace]
    seconds: float
    prompt_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests over the time from first sending to last token."""
        return sum(trace.tokens for trace in self.traces) / self.seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        """For workloads that are all prompt."""
        return self.prompt_tokens / self.seconds

    def row(self) -> dict[str, float]:
        """Figures for a table; milliseconds."""
        first = [trace.first * 1e3 for trace in self.traces]
        gaps = [gap * 1e3 for trace in self.traces for gap in trace.gaps] or [0.0]
        return {
            "tokens/s": self.tokens_per_second,
            "prompt tokens/s": self.prompt_tokens_per_second,
            **{f"ttft p{p}": percentile(first, p) for p in (50, 95, 99)},
            **{f"itl p{p}": percentile(gaps, p) for p in (50, 95, 99)},
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=1000, method="inclusive")[round(percent * 10) - 1]


async def _one(stub: pb_grpc.GenerationServiceStub, call: Call) -> Trace:
    trace = Trace()
    start = last = time.perf_counter()
    async for message in stub.GenerateStream(call.message()):
        if not message.generated_token_count:
            continue
        now = time.perf_counter()
        new = message.generated_token_count - trace.tokens
        if trace.tokens == 0:
            trace.first = now - start
        else:
            trace.gaps += [(now - last) / new] * new
        trace.tokens, last = message.generated_token_count, now
    trace.end = last
    if trace.tokens != call.new_tokens:
        raise RuntimeError(f"{trace.tokens} tokens instead of {call.new_tokens}")
    return trace


async def offer(address: str, calls: Sequence[Call]) -> Result:
    """Send all calls at once and wait for all."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        await channel.channel_ready()
        start = time.perf_counter()
        traces = await asyncio.gather(*(_one(stub, call) for call in calls))
    seconds = max(trace.end for trace in traces) - start
    return Result(list(traces), seconds, sum(call.prompt_tokens for call in calls))


def offered(address: str, calls: Sequence[Call]) -> Result:
    """`offer` from an event loop that takes as little of the machine's time as can be."""
    return uvloop.run(offer(address, calls))


def workloads() -> dict[str, list[Call]]:
    """The workloads of docs/performance.md, the same at every call.

    W1: one stream. 8, W2: 8 and 32 at once. W3: 64 of mixed lengths at once. W4: one long prompt.
    """
    rng = random.Random(0)
    mixed = [Call(rng.randint(16, 512), rng.randint(8, 256), seed) for seed in range(64)]
    return {
        "W1": [Call(128, 128)],
        "8": [Call(128, 128, seed) for seed in range(8)],
        "W2": [Call(128, 128, seed) for seed in range(32)],
        "W3": mixed,
        "W4": [Call(1024, 1)],
    }
