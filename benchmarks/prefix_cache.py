"""Time to the first token of prompts that begin alike, with the prefix cache and without.

    python -m benchmarks.prefix_cache --shape M
    python -m benchmarks.prefix_cache --model <directory> -- --threads 1

Starts a server, asks it for one token after prompts of `--shared` equal tokens and `--own` tokens
of their own, one after the other. The first of each series is cold, as is every one of the series
that shares nothing.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import grpc
from tests.kit.server import start_server

from benchmarks.models import SHAPES, make_model
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

_WORDS = "the little dog ran to the big tree and saw a small red bird with a happy friend"


def _text(num_words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(_WORDS.split()) for _ in range(num_words))


async def _cut(stub: pb_grpc.GenerationServiceStub, text: str, num_tokens: int) -> str:
    """The beginning of a text that is `num_tokens` tokens long."""
    request = pb.BatchedTokenizeRequest(
        requests=[pb.TokenizeRequest(text=text)], return_offsets=True
    )
    (response,) = (await stub.Tokenize(request)).responses
    if response.token_count < num_tokens:
        raise RuntimeError(f"only {response.token_count} tokens")
    return text[: response.offsets[num_tokens - 1].end]


async def _first_token(stub: pb_grpc.GenerationServiceStub, text: str) -> float:
    params = pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=1, min_new_tokens=1))
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), params=params)
    start = time.perf_counter()
    async for message in stub.GenerateStream(request):
        if message.generated_token_count:
            return time.perf_counter() - start
    raise RuntimeError("no token")


async def measure(address: str, shared: int, own: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token: prompts that share nothing, and prompts that share `shared`."""
    times: dict[str, list[float]] = {"cold": [], "hit": []}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        await _first_token(stub, _text(64, -1))
        stem = await _cut(stub, _text(2 * shared, 0), shared)
        await _first_token(stub, f"{stem} {_text(own, 1)}")
        for number in range(rounds):
            other = await _cut(stub, _text(2 * shared, 100 + number), shared)
            for kind, text in (("cold", other), ("hit", stem)):
                prompt = f"{text} {_text(own, 1000 + number)}"
                times[kind].append(await _first_token(stub, prompt))
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="M")
    parser.add_argument("--model", type=Path, help="a model instead of random weights")
    parser.add_argument("--shared", type=int, default=1024, help="tokens")
    parser.add_argument("--own", type=int, default=16, help="words")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("server_flags", nargs="*")
    arguments = parser.parse_args()
    cache = Path(tempfile.gettempdir()) / f"tgis-benchmark-{arguments.shape}"
    model = arguments.model or make_model(arguments.shape, cache)
    with tempfile.TemporaryDirectory() as directory:
        flags, dtype = arguments.server_flags, arguments.dtype
        server = start_server(model, Path(directory), *flags, dtype=dtype)
        try:
            server.wait_ready(300)
            times = asyncio.run(
                measure(server.grpc, arguments.shared, arguments.own, arguments.rounds)
            )
        finally:
            server.stop(30)
    cold, hit = (statistics.median(times[kind]) for kind in ("cold", "hit"))
    print(f"| {arguments.shared} shared tokens | ms to the first token |\n|---|---|")
    print(f"| cold | {cold * 1e3:.1f} |\n| hit | {hit * 1e3:.1f} |\n| ratio | {cold / hit:.1f} |")


if __name__ == "__main__":
    main()
