"""Streams cancelled at random points leave nothing in a real server."""

import asyncio
import contextlib
import os
import random
from pathlib import Path

import grpc
import pytest
from tests.kit.server import Server, run_server

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

SHARED = Path(os.environ.get("TGIS_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "models" / "stories260K"
STREAMS, AT_ONCE, PERMITS = 2000, 32, 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MODEL.exists(), reason=f"no model at {MODEL}"),
]


def request(rng: random.Random) -> pb.SingleGenerationRequest:
    text = "Once upon a time " * rng.choice([1, 1, 8]) + str(rng.random()) * rng.randint(0, 8)
    stopping = pb.StoppingCriteria(max_new_tokens=rng.randint(1, 60))
    return pb.SingleGenerationRequest(
        request=pb.GenerationRequest(text=text), params=pb.Parameters(stopping=stopping)
    )


async def cancel_some(stub: pb_grpc.GenerationServiceStub, rng: random.Random) -> int:
    """Read some messages of one stream, then leave it; 1 if that cut it off."""
    call = stub.GenerateStream(request(rng))
    patience = rng.choice([0, 0, 1, 2, 5, 20])
    seen = 0
    with contextlib.suppress(asyncio.CancelledError):
        if patience:
            async for _ in call:
                seen += 1
                if seen >= patience:
                    break
    return int(call.cancel())


async def storm(address: str) -> int:
    rng = random.Random(0)
    cancelled = 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        for _ in range(STREAMS // AT_ONCE):
            # Fewer at once than there are permits, so that a lost permit shows sooner or later.
            cancelled += sum(
                await asyncio.gather(*(cancel_some(stub, rng) for _ in range(AT_ONCE)))
            )
        await asyncio.gather(*(whole(stub, rng) for _ in range(AT_ONCE)))
    return cancelled


async def whole(stub: pb_grpc.GenerationServiceStub, rng: random.Random) -> None:
    """A stream that is read to its end."""
    reasons = [message.stop_reason async for message in stub.GenerateStream(request(rng))]
    assert reasons[-1] != pb.NOT_FINISHED


def gauge(server: Server, name: str) -> float:
    _, text = server.get("/metrics")
    (value,) = (line.split()[1] for line in text.splitlines() if line.startswith(name + " "))
    return float(value)


def test_streams_cancelled_at_random_points_leave_nothing() -> None:
    flags = ["--max-concurrent-requests", str(PERMITS), "--max-batch-size", "8"]
    with run_server(MODEL, *flags) as server:
        cancelled = asyncio.run(storm(server.grpc))
        assert cancelled > STREAMS / 2
        for name in ("tgi_batch_current_size", "tgi_queue_size", "tgi_kv_cache_usage"):
            assert gauge(server, name) == 0, name
        assert "the accounts are wrong" not in server.log()
        assert "Traceback" not in server.log()
