"""Random requests of every method over a real socket, to a running server.

    tgis serve --max-new-tokens 16 &
    python -m tests.fuzz.wire --server 127.0.0.1:8033 --count 50000 [--seed 0] [--concurrency 64]

Exits 0 when every call ended with OK, INVALID_ARGUMENT or RESOURCE_EXHAUSTED, in time, and the
server still answers. Anything else stops the run and is printed with the message that caused it.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter

import grpc
from google.protobuf.message_factory import GetMessageClass
from tests.fuzz.messages import BYTES, Messages, sized, tag
from tests.fuzz.validation import make_message

from tgis.proto import generation_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]
EXPECTED = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
TIMEOUT = 120.0  # seconds for one call
REQUEST_NUMBER = pb.SingleGenerationRequest.REQUEST_FIELD_NUMBER  # as in a batch
TOKENIZE_NUMBER = pb.BatchedTokenizeRequest.REQUESTS_FIELD_NUMBER
METHODS = ("Generate", "GenerateStream", "Tokenize", "ModelInfo")
WEIGHTS = (45, 45, 9, 1)


TEXTS = [b"Once upon a time", b"", b"a" * 200, "né🙂".encode(), b"\0\n"]


def draw(messages: Messages) -> tuple[str, bytes]:
    """A method and a body for it, which mostly has an input."""
    rng = messages.rng
    (name,) = rng.choices(METHODS, WEIGHTS)
    kind = SERVICE.methods_by_name[name].input_type
    if name.startswith("Generate"):
        body = _input(rng, pb.GenerationRequest.TEXT_FIELD_NUMBER, REQUEST_NUMBER)
        body += make_message(messages, GetMessageClass(kind))
    else:
        body = messages.message(kind, fill=0.2)
        if name == "Tokenize":
            body += _input(rng, pb.TokenizeRequest.TEXT_FIELD_NUMBER, TOKENIZE_NUMBER)
    return name, messages.damaged(body) if rng.random() < 0.1 else body


def _input(rng: random.Random, text_number: int, number: int) -> bytes:
    if rng.random() < 0.1:
        return b""
    return tag(number, BYTES) + sized(tag(text_number, BYTES) + sized(rng.choice(TEXTS)))


async def send(channel: grpc.aio.Channel, name: str, body: bytes) -> str:
    """The name of the status that the call ends with; the answer must be well-formed."""
    method = SERVICE.methods_by_name[name]
    path, answer = f"/{SERVICE.full_name}/{name}", GetMessageClass(method.output_type)
    try:
        if method.server_streaming:
            call = channel.unary_stream(path, response_deserializer=answer.FromString)
            async for _ in call(body, timeout=TIMEOUT):
                pass
        else:
            call = channel.unary_unary(path, response_deserializer=answer.FromString)
            await call(body, timeout=TIMEOUT)
    except grpc.aio.AioRpcError as error:
        status: str = error.code().name
        if status not in EXPECTED:
            raise
        return status
    return "OK"


async def run(channel: grpc.aio.Channel, count: int, seed: int, concurrency: int) -> Counter[str]:
    """Send `count` random messages, `concurrency` at a time, and count what became of them."""
    messages = Messages(random.Random(seed))
    outcomes: Counter[str] = Counter()
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            name, body = draw(messages)
            try:
                outcomes[f"{name} {await send(channel, name, body)}"] += 1
            except Exception as error:
                error.add_note(f"message {number} of seed {seed}, {name}: {body.hex()}")
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    assert await send(channel, "ModelInfo", b"") == "OK"
    return outcomes


async def _main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    async with grpc.aio.insecure_channel(args.server) as channel:
        try:
            outcomes = await run(channel, args.count, args.seed, args.concurrency)
        except ExceptionGroup as errors:  # those who failed while the first was reported
            raise errors.exceptions[0] from None
    for outcome, times in sorted(outcomes.items()):
        print(f"{times:9}  {outcome}")
    print(f"{args.count} calls in {time.perf_counter() - start:.1f} s, nothing unexpected")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz.wire")
    parser.add_argument("--server", default="127.0.0.1:8033")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=64)
    asyncio.run(_main(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
