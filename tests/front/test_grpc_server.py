"""The gRPC server with a small servicer, over real sockets of the loopback interface."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.kit.certificates import make_certificate

from tgis.config import Config
from tgis.errors import (
    STATUS,
    ConfigError,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    Unavailable,
)
from tgis.front.grpc_server import GENERATION_SERVICE, GrpcServer
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc

LOOPBACK = "127.0.0.1"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Service(generation_pb2_grpc.GenerationServiceServicer):
    """Answers as the test says: raises `error`, waits for `gate`, repeats what it is sent."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self.cancelled = False
        self.serving = False

    async def Generate(self, request, context):
        self.began.set()
        try:
            await self.gate.wait()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()
        texts = [item.text for item in request.requests]
        return pb.BatchedGenerationResponse(
            responses=[pb.GenerationResponse(text=text) for text in texts]
        )

    async def GenerateStream(self, request, context):
        try:
            for count in range(1, 4):
                yield pb.GenerationResponse(generated_token_count=count, text=request.request.text)
            self.began.set()
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            yield pb.GenerationResponse(generated_token_count=4, stop_reason=pb.MAX_TOKENS)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()

    async def Tokenize(self, request, context):
        return pb.BatchedTokenizeResponse()

    async def ModelInfo(self, request, context):
        return pb.ModelInfoResponse(max_new_tokens=5)


class Running(NamedTuple):
    server: GrpcServer
    port: int
    channel: grpc.aio.Channel
    stub: generation_pb2_grpc.GenerationServiceStub


@contextlib.asynccontextmanager
async def running(service: Service, interceptors=(), **settings) -> AsyncIterator[Running]:
    config = Config(model_name="x", host=LOOPBACK, grpc_port=0, **settings)
    server = GrpcServer(config, lambda: service.serving, interceptors)
    server.add_service(GENERATION_SERVICE, service)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{port}") as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            yield Running(server, port, channel, stub)
    finally:
        await server.stop(0)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def here(service):
    async with running(service) as here:
        yield here


@pytest.fixture
def channel(here):
    return here.channel


@pytest.fixture
def stub(here):
    return here.stub


def batch(*texts: str) -> pb.BatchedGenerationRequest:
    return pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text=text) for text in texts])


SINGLE = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="a"))


async def failure_of(call) -> grpc.aio.AioRpcError:
    """The error that ends a call, unary or streaming."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drained(call) if hasattr(call, "__aiter__") else call)
    return caught.value


async def drained(call) -> list[pb.GenerationResponse]:
    return [message async for message in call]


# ---- calls ----


async def test_all_methods_answer(stub):
    response = await stub.Generate(batch("a", "né🙂"))
    assert [item.text for item in response.responses] == ["a", "né🙂"]
    counts = [message.generated_token_count async for message in stub.GenerateStream(SINGLE)]
    assert counts == [1, 2, 3, 4]
    assert await stub.Tokenize(pb.BatchedTokenizeRequest()) == pb.BatchedTokenizeResponse()
    assert (await stub.ModelInfo(pb.ModelInfoRequest())).max_new_tokens == 5


async def test_unknown_method_is_unimplemented(channel):
    error = await failure_of(channel.unary_unary("/fmaas.GenerationService/Nothing")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- errors become statuses ----

ERRORS = [
    InvalidRequest("top_p must be > 0.0 and <= 1.0"),
    Overloaded("Model is overloaded"),
    Unavailable("the engine was restarted", retry_after_ms=250),
    GenerationFailed("Request failed during generation: é"),
    OutOfMemory("Request failed during generation: out of memory"),
]
METHODS = {"Generate": batch("a"), "GenerateStream": SINGLE}


def test_every_kind_of_error_is_tried():
    assert {type(error) for error in ERRORS} == set(STATUS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("raised", ERRORS, ids=lambda error: type(error).__name__)
async def test_errors_have_their_status(service, stub, method, raised):
    service.error = raised
    error = await failure_of(getattr(stub, method)(METHODS[method]))
    assert error.code().name == STATUS[type(raised)].grpc
    assert error.details() == str(raised)
    hint = dict(error.trailing_metadata()).get("retry-after-ms")
    assert hint == ("250" if isinstance(raised, Unavailable) else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("raised", [None, *ERRORS], ids=lambda error: type(error).__name__)
async def test_correlation_ids_come_back_however_a_call_ends(service, stub, method, raised):
    service.error = raised
    call = getattr(stub, method)(METHODS[method], metadata=[("x-correlation-id", "corr 7")])
    if raised is None:
        await (drained(call) if hasattr(call, "__aiter__") else call)
    else:
        await failure_of(call)
    trailers = dict(await call.trailing_metadata())
    assert trailers["x-correlation-id"] == "corr 7"
    assert ("retry-after-ms" in trailers) is isinstance(raised, Unavailable)


async def test_correlation_ids_come_back_from_every_method(stub):
    for name, message in (
        ("Tokenize", pb.BatchedTokenizeRequest()),
        ("ModelInfo", pb.ModelInfoRequest()),
    ):
        call = getattr(stub, name)(message, metadata=[("x-correlation-id", name)])
        await call
        assert dict(await call.trailing_metadata()) == {"x-correlation-id": name}


async def test_subclass_of_an_error_has_the_status_of_its_kind(service, stub):
    class TooSlow(Unavailable):
        pass

    service.error = TooSlow("later")
    error = await failure_of(stub.Generate(batch("a")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("method", METHODS)
async def test_unexpected_errors_are_logged_and_hidden(service, stub, method, caplog):
    service.error = KeyError("SECRET")
    with caplog.at_level(logging.ERROR):
        error = await failure_of(getattr(stub, method)(METHODS[method]))
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert error.details() == "Request failed: internal error"
    (record,) = caplog.records
    assert record.name == "tgis.front"
    assert record.exc_info[1] is service.error


async def test_messages_before_the_error_arrive(service, stub):
    service.error = GenerationFailed("late")
    call = stub.GenerateStream(SINGLE)
    assert [(await call.read()).generated_token_count for _ in range(3)] == [1, 2, 3]
    with pytest.raises(grpc.aio.AioRpcError, match="late"):
        await call.read()


async def test_long_details_are_cut(service, stub):
    service.error = InvalidRequest("é" * 5000)
    error = await failure_of(stub.Generate(batch("a")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "é" * 1000 + "..."


@pytest.mark.parametrize("method", [method.name for method in GENERATION_SERVICE.methods])
async def test_malformed_requests_are_the_clients_fault(channel, caplog, method):
    path = f"/{GENERATION_SERVICE.full_name}/{method}"
    is_stream = GENERATION_SERVICE.methods_by_name[method].server_streaming
    call = channel.unary_stream(path) if is_stream else channel.unary_unary(path)
    for body in (b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xff"):
        error = await failure_of(call(body))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "is not a valid fmaas." in error.details()
    assert not caplog.records


async def test_malformed_health_check_is_the_clients_fault(channel):
    error = await failure_of(channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---- cancellation and deadlines ----


@pytest.mark.parametrize("method", METHODS)
async def test_cancelled_call_ends_its_handler(service, stub, method, caplog):
    service.gate.clear()
    call = getattr(stub, method)(METHODS[method])
    await service.began.wait()
    call.cancel()
    await service.ended.wait()
    assert service.cancelled
    assert not caplog.records


@pytest.mark.parametrize("method", METHODS)
async def test_deadline_ends_the_handler(service, stub, method, caplog):
    service.gate.clear()
    error = await failure_of(getattr(stub, method)(METHODS[method], timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await service.ended.wait()
    assert service.cancelled
    assert not caplog.records


class Firehose(Service):
    async def GenerateStream(self, request, context):
        try:
            while True:
                yield pb.GenerationResponse(text="x" * 10_000)
        finally:
            self.ended.set()


async def test_generator_is_closed_when_the_client_goes_while_messages_are_written(caplog):
    service = Firehose()
    async with running(service) as here:
        call = here.stub.GenerateStream(SINGLE)
        await call.read()
        call.cancel()
        await service.ended.wait()
    assert not caplog.records


# ---- limits ----


async def test_message_limit(service):
    async with running(service, max_message_bytes=10_000) as here:
        await here.stub.Generate(batch("a" * 9_900))
        error = await failure_of(here.stub.Generate(batch("a" * 10_000)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        small_when_packed = batch("a" * 1_000_000)
        error = await failure_of(
            here.stub.Generate(small_when_packed, compression=grpc.Compression.Gzip)
        )
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await here.stub.Generate(batch("a"))  # the connection lives on


async def test_compressed_requests_are_understood(stub):
    response = await stub.Generate(batch("a" * 1000), compression=grpc.Compression.Gzip)
    assert response.responses[0].text == "a" * 1000


async def test_answers_may_be_large(stub):
    response = await stub.Generate(batch("a" * 4_000_000))
    assert len(response.responses[0].text) == 4_000_000


async def test_metadata_limit(stub):
    for _ in range(20):  # what a client would only drop now and then must never come back
        await stub.Generate(batch("a"), metadata=[("x-correlation-id", "i" * 12_000)])
    error = await failure_of(stub.Generate(batch("a"), metadata=[("x-long", "i" * 20_000)]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_interceptors_see_every_call(service):
    seen = []

    class Note(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation, details):
            seen.append(details.method)
            return await continuation(details)

    async with running(service, interceptors=[Note()]) as here:
        await here.stub.Generate(batch("a"))
        await health_pb2_grpc.HealthStub(here.channel).Check(health_pb2.HealthCheckRequest())
    assert seen == ["/fmaas.GenerationService/Generate", "/grpc.health.v1.Health/Check"]


# ---- listening ----


def server_on(port: int, host: str = LOOPBACK, **settings) -> GrpcServer:
    config = Config(model_name="x", host=host, grpc_port=port, **settings)
    return GrpcServer(config, lambda: True)


async def test_port_in_use_by_another_of_us(here):
    port = here.port
    with pytest.raises(ConfigError) as caught:
        await server_on(port).start()
    assert str(caught.value) == (
        f"--grpc-port={port}: cannot listen on 127.0.0.1, port {port}: Address already in use"
    )


async def test_port_in_use_by_anybody_names_the_variable_that_set_it():
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        server = server_on(port, origins={"grpc_port": "GRPC_PORT"})
        with pytest.raises(ConfigError, match=f"^GRPC_PORT={port}: .* Address already in use$"):
            await server.start()


async def test_address_of_another_machine():
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        await server_on(0, host="203.0.113.7").start()


async def test_localhost_by_name():
    server = server_on(0, host="localhost")
    port = await server.start()
    async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
    await server.stop(0)


async def test_tls(service, tmp_path):
    cert, key = make_certificate(tmp_path)
    server = server_on(0, host="localhost")
    server.add_service(GENERATION_SERVICE, service)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    port = await server.start(credentials)
    trusting = grpc.ssl_channel_credentials(cert.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{port}", trusting) as channel:
        await generation_pb2_grpc.GenerationServiceStub(channel).Generate(batch("a"))
    async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(batch("a"))
        assert (await failure_of(call)).code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(0)


# ---- health ----


async def test_health_follows(here, service):
    health = health_pb2_grpc.HealthStub(here.channel)

    async def check(name: str) -> int:
        return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

    watch = health.Watch(health_pb2.HealthCheckRequest(service="fmaas.GenerationService"))
    assert (await watch.read()).status == NOT_SERVING
    for serving, status in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
        service.serving = serving
        assert await check("") == status  # also before anybody is told
        here.server.health_changed()
        assert (await watch.read()).status == status
        assert await check("") == status
        assert await check("fmaas.GenerationService") == status


async def test_health_is_not_serving_until_told(channel):
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


async def test_health_of_every_name(channel):
    listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    assert {name: answer.status for name, answer in listed.statuses.items()} == {
        "": NOT_SERVING,
        "fmaas.GenerationService": NOT_SERVING,
    }


async def test_health_of_an_unknown_service(channel):
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="nothing")
    error = await failure_of(health.Check(request))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(request)
    assert (await watch.read()).status == SERVICE_UNKNOWN
    watch.cancel()


# ---- reflection ----


async def test_reflection_describes_the_contract(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="fmaas.GenerationService"),
    ]
    answers = [answer async for answer in stub.ServerReflectionInfo(requests)]
    assert {item.name for item in answers[0].list_services_response.service} == {
        "fmaas.GenerationService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    (file,) = answers[1].file_descriptor_response.file_descriptor_proto
    assert file == pb.DESCRIPTOR.serialized_pb


# ---- stopping ----


@pytest.mark.parametrize("method", METHODS)
async def test_stop_lets_open_calls_end(service, here, method):
    service.gate.clear()
    watch = health_pb2_grpc.HealthStub(here.channel).Watch(health_pb2.HealthCheckRequest())
    service.serving = True
    here.server.health_changed()
    while (await watch.read()).status != SERVING:
        pass
    call = getattr(here.stub, method)(METHODS[method])
    await service.began.wait()
    stopping = asyncio.create_task(here.server.stop(60))
    assert (await watch.read()).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
        await watch.read()
    assert not stopping.done()
    service.gate.set()
    if method == "Generate":
        assert len((await call).responses) == 1
    else:
        assert [message.generated_token_count for message in await drained(call)] == [1, 2, 3, 4]
    # the open watch does not hold the server up for the rest of the minute
    await asyncio.wait_for(stopping, 10)
    assert not service.cancelled


async def test_stop_cancels_what_takes_too_long(service, here):
    service.gate.clear()
    call = here.stub.Generate(batch("a"))
    await service.began.wait()
    await here.server.stop(0.05)
    await service.ended.wait()
    assert service.cancelled
    assert (await failure_of(call)).code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    )


async def test_no_new_calls_while_stopping(service, here):
    service.gate.clear()
    open_call = here.stub.Generate(batch("a"))
    await service.began.wait()
    stopping = asyncio.create_task(here.server.stop(60))
    await asyncio.wait_for(here.channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 10)
    error = await failure_of(here.stub.Generate(batch("b")))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    service.gate.set()
    assert len((await open_call).responses) == 1
    await stopping


async def test_idle_server_stops_at_once_and_may_be_told_twice(here):
    stops = [here.server.stop(60), here.server.stop(60)]
    await asyncio.wait_for(asyncio.gather(*stops), 10)
