"""Time limits, overload and bursts: answers that depend on more than the request."""

import asyncio
from typing import Any

import grpc
from tests.contract.cases import BATCH_SIZE
from tests.contract.conftest import LIMITS
from tests.kit.client import AsyncClient, Client, Status, connect, parse, to_json
from tests.kit.server import Server

from tgis.proto import generation_pb2_grpc as pb_grpc

LONG = {"maxNewTokens": LIMITS.max_new_tokens, "minNewTokens": LIMITS.max_new_tokens}
TEXT = "Once upon a time"
NUM_INPUT_TOKENS = 5


def one(text: str = TEXT, **params: Any) -> dict[str, Any]:
    return {"requests": [{"text": text}], "params": params}


def stream_of(text: str = TEXT, **params: Any) -> dict[str, Any]:
    return {"request": {"text": text}, "params": params}


def test_time_limit_ends_a_response(demo_client: Client) -> None:
    stopping = LONG | {"timeLimitMillis": 40}
    found = demo_client.call("Generate", one(stopping=stopping))
    assert not isinstance(found, Status), found
    (response,) = found["responses"]
    assert response["stopReason"] == "TIME_LIMIT"
    assert 1 <= response["generatedTokenCount"] < LIMITS.max_new_tokens
    assert response["text"]


def test_time_limit_ends_a_stream(demo_client: Client) -> None:
    stopping = LONG | {"timeLimitMillis": 40}
    messages, status = demo_client.stream(stream_of(stopping=stopping))
    assert status is None
    assert messages[0] == {"inputTokenCount": NUM_INPUT_TOKENS}
    assert messages[-1]["stopReason"] == "TIME_LIMIT"
    assert 1 <= messages[-1]["generatedTokenCount"] < LIMITS.max_new_tokens


def test_the_smallest_time_limit_still_gives_a_token(demo_client: Client) -> None:
    """As the reference: a request that need not queue enters the batch first."""
    found = demo_client.call("Generate", one(stopping=LONG | {"timeLimitMillis": 1}))
    assert not isinstance(found, Status), found
    (response,) = found["responses"]
    assert response["stopReason"] == "TIME_LIMIT"
    assert 1 <= response["generatedTokenCount"] < LIMITS.max_new_tokens


def test_a_wide_time_limit_changes_nothing(demo_client: Client) -> None:
    plain = demo_client.call("Generate", one())
    assert demo_client.call("Generate", one(stopping={"timeLimitMillis": 2**32 - 1})) == plain


async def test_time_limit_in_the_queue(demo_server: Server) -> None:
    """Expired before it started: an empty answer, and nothing of the sampling that never was."""
    sample = {"method": "SAMPLE", "sampling": {"seed": 5}}
    late = sample | {"stopping": {"timeLimitMillis": 1}, "response": {"inputText": True}}
    async with grpc.aio.insecure_channel(demo_server.grpc) as channel, asyncio.TaskGroup() as group:
        stub = pb_grpc.GenerationServiceStub(channel)
        full = [
            stub.GenerateStream(parse("GenerateStream", stream_of(stopping=LONG)))
            for _ in range(BATCH_SIZE)
        ]
        running = [aiter(call) for call in full]
        for call in running:  # all places of the batch are taken once each has generated
            while not (await anext(call)).generated_token_count:
                pass
        client = AsyncClient(channel)
        unary = group.create_task(client.call("Generate", one(**late)))
        stream = group.create_task(client.stream(stream_of(**late)))
        await asyncio.gather(unary, stream)
        ends = [[to_json(message) async for message in call][-1] for call in running]
    empty = {"inputTokenCount": NUM_INPUT_TOKENS, "stopReason": "TIME_LIMIT"}
    assert unary.result() == {"responses": [empty]}
    first = {"inputTokenCount": NUM_INPUT_TOKENS, "seed": "5", "text": TEXT}
    assert stream.result() == ([first, {"stopReason": "TIME_LIMIT"}], None)
    for end in ends:
        assert end["generatedTokenCount"] == LIMITS.max_new_tokens
        assert end["stopReason"] == "MAX_TOKENS"


def test_more_inputs_than_places_are_refused(demo_client: Client) -> None:
    short = {"stopping": {"maxNewTokens": 1}}
    inputs = [{"text": "a"}] * LIMITS.max_concurrent_requests
    refused = demo_client.call("Generate", {"requests": [*inputs, {"text": "a"}], "params": short})
    assert refused == Status("RESOURCE_EXHAUSTED", "Model is overloaded")
    # Overload is found before the parameters are looked at.
    wrong = {"stopping": {"maxNewTokens": LIMITS.max_new_tokens + 1}}
    refused = demo_client.call("Generate", {"requests": [*inputs, {"text": "a"}], "params": wrong})
    assert refused == Status("RESOURCE_EXHAUSTED", "Model is overloaded")
    accepted = demo_client.call("Generate", {"requests": inputs, "params": short})
    assert not isinstance(accepted, Status), accepted
    assert len(accepted["responses"]) == len(inputs)


async def test_a_burst_on_a_new_channel(demo_server: Server) -> None:
    """As many streams at once as there are places, all of them opened before any settings of the
    server can have arrived.
    """
    short = {"stopping": {"maxNewTokens": 1}}
    async with connect(demo_server.grpc) as client:
        runs = [client.stream(stream_of(**short)) for _ in range(LIMITS.max_concurrent_requests)]
        outcomes = await asyncio.gather(*runs)
    assert {status for _, status in outcomes} == {None}
    first, *others = [messages for messages, _ in outcomes]
    assert all(messages == first for messages in others)
