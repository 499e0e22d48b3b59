"""Hostile messages over a real socket, with honest requests beside them that must not notice.

The long run is a command: python -m tests.fuzz.wire --server HOST:PORT --count 50000
"""

import asyncio
from collections import Counter

import grpc
from tests.fuzz.wire import run
from tests.kit.client import AsyncClient, connect
from tests.kit.server import Server

HONEST = {
    "requests": [{"text": "Once upon a time"}, {"text": "One day, a dog named Max"}],
    "params": {
        "method": "SAMPLE",
        "sampling": {"seed": 11, "temperature": 0.9},
        "stopping": {"maxNewTokens": 12},
        "response": {"inputTokens": True, "generatedTokens": True, "tokenRanks": True},
    },
}


async def honest_answers(client: AsyncClient, until: asyncio.Task[Counter[str]]) -> list[object]:
    answers: list[object] = []
    while not until.done():
        answers.append(await client.call("Generate", HONEST))
    return answers


async def test_hostile_messages_disturb_nobody(demo_server: Server) -> None:
    async with (
        connect(demo_server.grpc) as client,
        grpc.aio.insecure_channel(demo_server.grpc) as channel,
    ):
        alone = await client.call("Generate", HONEST)
        assert isinstance(alone, dict), alone
        fuzz = asyncio.create_task(run(channel, count=500, seed=7, concurrency=16))
        answers = await honest_answers(client, fuzz)
        outcomes = fuzz.result()
        assert await client.call("Generate", HONEST) == alone
    assert outcomes.total() == 500
    assert answers
    assert all(answer == alone for answer in answers)
    assert demo_server.process.poll() is None
