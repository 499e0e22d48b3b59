"""Our services at a server that takes them as Serve's proxy does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from tgis.cluster import ingress
from tgis.cluster.affinity import MARK, NO_KEY, key_in, key_of
from tgis.cluster.ending import Ending, encode
from tgis.proto import generation_pb2 as pb

UNARY = "/fmaas.GenerationService/Generate"
STREAM = "/fmaas.GenerationService/GenerateStream"
IDENTIFIER = ("x-correlation-id", "abc-123")
SERVES_OWN = ("request_id", "of Serve")
LOST = (grpc.StatusCode.UNAVAILABLE, "the replica that worked on the request is gone")


class Proxy:
    """Keeps what is added, as far as Serve looks at it."""

    def __init__(self) -> None:
        self.methods: dict[str, Any] = {}
        self.added: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: tuple[Any]) -> None:
        """Serve reads the same attribute, and replaces it."""
        self.methods |= handlers[0]._method_handlers
        self.added += handlers

    def route(self, **behaviour: Any) -> None:
        """What Serve's routing is to do."""
        for handler in self.added:
            handler._method_handlers = {
                name: method._replace(**behaviour, response_serializer=None)
                for name, method in handler._method_handlers.items()
            }


@pytest.fixture
def proxy() -> Proxy:
    found = Proxy()
    ingress.add_services(None, found)  # type: ignore[arg-type]
    return found


def test_every_method_of_both_services(proxy: Proxy) -> None:
    assert set(proxy.methods) >= {
        UNARY,
        STREAM,
        "/fmaas.GenerationService/Tokenize",
        "/fmaas.GenerationService/ModelInfo",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    }
    assert set(proxy.methods) == {ingress.path_of(method) for method in ingress.METHODS.values()}
    streaming = {name for name, method in proxy.methods.items() if method.response_streaming}
    assert streaming == {STREAM, "/grpc.health.v1.Health/Watch"}


def test_requests_pass_as_bytes_with_their_key(proxy: Proxy) -> None:
    request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="Once upon a time"))
    data = request.SerializeToString()
    marked = proxy.methods[STREAM].request_deserializer(data)
    assert marked == MARK + key_of(request) + data
    assert key_in(b"pickled " + marked) == key_of(request)


@pytest.mark.parametrize("method", ["Generate", "ModelInfo"])
def test_what_is_no_prompt_has_no_key(proxy: Proxy, method: str) -> None:
    read = proxy.methods[f"/fmaas.GenerationService/{method}"].request_deserializer
    assert read(b"\xff\xff") == MARK + NO_KEY + b"\xff\xff"


@asynccontextmanager
async def serving(proxy: Proxy, *messages: bytes, code: Any = None) -> AsyncIterator[Any]:
    """A channel to a server whose routing answers every call so, and says what Serve says."""

    def end(context: Any) -> None:
        context.set_trailing_metadata([SERVES_OWN])
        if code is not None:
            context.set_code(code)
            context.set_details("The actor died unexpectedly, and so on for pages")

    async def unary(request: bytes, context: Any) -> bytes:
        end(context)
        return b"".join(messages)

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for message in messages:
            yield message
        end(context)

    proxy.route(unary_unary=unary, unary_stream=stream)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(tuple(proxy.added))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def outcome(channel: Any, path: str) -> tuple[list[bytes], Any, str, dict[str, str]]:
    """Messages, status, details and trailing metadata of a call."""
    if path == UNARY:
        call = channel.unary_unary(path)(b"", metadata=[IDENTIFIER])
        messages = [await call] if await call.code() is grpc.StatusCode.OK else []
    else:
        call = channel.unary_stream(path)(b"", metadata=[IDENTIFIER])
        messages = []
        try:
            async for message in call:
                messages.append(message)
        except grpc.aio.AioRpcError:
            pass  # the code says so
    return messages, await call.code(), await call.details(), dict(await call.trailing_metadata())


def ending(code: grpc.StatusCode, details: str, trailers: Any = (), message: bytes = b"") -> bytes:
    return encode(Ending(code.value[0], details, list(trailers), message))


@pytest.mark.parametrize("path", [UNARY, STREAM])
async def test_the_end_of_a_call_is_the_servers(proxy: Proxy, path: str) -> None:
    """Also with metadata that was not known before, and where Serve counts a success."""
    trailers = [IDENTIFIER, ("checksum-bin", b"\x00\xff")]
    refused = ending(grpc.StatusCode.INVALID_ARGUMENT, "too long", trailers)
    async with serving(proxy, refused) as channel:
        found = await outcome(channel, path)
    told = dict([*trailers, SERVES_OWN])
    assert found == ([], grpc.StatusCode.INVALID_ARGUMENT, "too long", told)


async def test_messages_come_before_the_end(proxy: Proxy) -> None:
    last = ending(grpc.StatusCode.UNAVAILABLE, "engine died", [("retry-after-ms", "250")])
    async with serving(proxy, b"one", b"", b"two", last) as channel:
        messages, code, details, trailers = await outcome(channel, STREAM)
    assert messages == [b"one", b"", b"two"]
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "engine died")
    assert trailers["retry-after-ms"] == "250"


async def test_the_message_of_a_unary_call(proxy: Proxy) -> None:
    whole = ending(grpc.StatusCode.OK, "", [IDENTIFIER], b"answer")
    async with serving(proxy, whole) as channel:
        messages, code, _, trailers = await outcome(channel, UNARY)
    assert (messages, code) == ([b"answer"], grpc.StatusCode.OK)
    assert trailers == dict([IDENTIFIER, SERVES_OWN])


@pytest.mark.parametrize("path", [UNARY, STREAM])
@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, None])
async def test_a_call_without_an_end_has_lost_its_replica(
    proxy: Proxy, path: str, code: grpc.StatusCode | None
) -> None:
    """It may be repeated; what Serve writes about its actors is for the operator."""
    async with serving(proxy, code=code) as channel:
        found = await outcome(channel, path)
    assert found == ([], *LOST, dict([SERVES_OWN, IDENTIFIER, ("retry-after-ms", "1000")]))


@pytest.mark.parametrize("path", [UNARY, STREAM])
async def test_a_server_that_is_gone_from_its_replica(proxy: Proxy, path: str) -> None:
    cut_off = ending(grpc.StatusCode.UNAVAILABLE, "connection refused: ipv4:127.0.0.1:1234")
    async with serving(proxy, cut_off) as channel:
        _, *status, trailers = await outcome(channel, path)
    assert tuple(status) == LOST
    assert trailers["retry-after-ms"] == "1000"


@pytest.mark.parametrize("path", [UNARY, STREAM])
async def test_other_statuses_of_serve_stay(proxy: Proxy, path: str) -> None:
    async with serving(proxy, code=grpc.StatusCode.RESOURCE_EXHAUSTED) as channel:
        _, code, _, trailers = await outcome(channel, path)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers == dict([SERVES_OWN, IDENTIFIER])
