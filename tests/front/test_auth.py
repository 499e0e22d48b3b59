"""API keys and names of clients: every method, every way to give a wrong key, no way around."""

import contextlib
import hashlib
import hmac
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.kit.certificates import Authority

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.front.auth import OPEN_METHODS, Gate, parse_keys, watch_keys
from tgis.front.grpc_server import GENERATION_SERVICE, GrpcServer
from tgis.front.reload import BadFileError
from tgis.front.tls import Tls
from tgis.observe.metrics import Limits, Metrics
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc

KEYS = ("first secret", "second-secret")
HASHES = tuple(hashlib.sha256(key.encode()).digest() for key in KEYS)
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = [f"/{GENERATION_SERVICE.full_name}/{m.name}" for m in GENERATION_SERVICE.methods]
GUARDED = [*METHODS, REFLECTION]

GOOD = [
    {"authorization": f"Bearer {KEYS[0]}"},
    {"authorization": f"bearer {KEYS[1]}"},
    {"authorization": f"BEARER   {KEYS[1]}  "},
    {"x-api-key": KEYS[0]},
    {"x-api-key": KEYS[1], "x-other": "y"},
]
BAD = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": KEYS[0]},
    {"authorization": f"Basic {KEYS[0]}"},
    {"authorization": f"Bearer{KEYS[0]}"},
    {"authorization": f"Bearer {KEYS[0]}x"},
    {"authorization": f"Bearer x{KEYS[0]}"},
    {"authorization": f"Bearer {KEYS[0].upper()}"},
    {"authorization": f"Bearer {HASHES[0].hex()}"},
    {"authorization": f"Bearer {KEYS[0]}, Bearer {KEYS[1]}"},
    {"x-api-key": ""},
    {"x-api-key": HASHES[0].hex()},
    {"x-api-key": f"Bearer {KEYS[0]}"},
    {"x-api-key": "wrong", "authorization": f"Bearer {KEYS[0]}"},
    {"x-api-key": KEYS[0], "authorization": "Bearer wrong"},
    {"api-key": KEYS[0]},
    {"x-api-key-bin": KEYS[0].encode()},
    {"cookie": f"x-api-key={KEYS[0]}"},
]


class Service(generation_pb2_grpc.GenerationServiceServicer):
    """Answers everything, and counts how often it was reached."""

    reached = 0

    async def Generate(self, request, context):
        Service.reached += 1
        return pb.BatchedGenerationResponse()

    async def GenerateStream(self, request, context):
        Service.reached += 1
        yield pb.GenerationResponse()

    async def Tokenize(self, request, context):
        Service.reached += 1
        return pb.BatchedTokenizeResponse()

    async def ModelInfo(self, request, context):
        Service.reached += 1
        return pb.ModelInfoResponse()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Limits(16, 8, 4))


def refused(metrics: Metrics, reason: str) -> float:
    start = f'tgi_auth_failure_total{{reason="{reason}"}} '
    (line,) = [x for x in metrics.render().decode().splitlines() if x.startswith(start)]
    return float(line.split()[-1])


@contextlib.asynccontextmanager
async def running(gate: Gate) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer(Config(host="127.0.0.1", grpc_port=0), lambda: True, [gate])
    server.add_service(GENERATION_SERVICE, Service())
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


@pytest.fixture
async def channel(metrics: Metrics) -> AsyncIterator[grpc.aio.Channel]:
    async with running(Gate(lambda: HASHES, (), metrics)) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, method: str, metadata: dict[str, str]) -> str:
    """The name of the status that a call ends with."""
    pairs = list(metadata.items())
    body = b""
    if method == REFLECTION:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stream = channel.stream_stream(method)(iter([request.SerializeToString()]), metadata=pairs)
    else:
        stream = channel.unary_stream(method)(body, metadata=pairs)
    try:
        messages = [message async for message in stream]
    except grpc.aio.AioRpcError as error:
        return error.code().name
    assert messages
    return "OK"


@pytest.mark.parametrize("metadata", GOOD, ids=str)
async def test_a_key_opens_every_method(
    channel: grpc.aio.Channel, metadata: dict[str, str]
) -> None:
    for method in GUARDED:
        assert await call(channel, method, metadata) == "OK", method


@pytest.mark.parametrize("metadata", BAD, ids=str)
async def test_nothing_else_opens_any(channel: grpc.aio.Channel, metadata: dict[str, str]) -> None:
    before = Service.reached
    for method in GUARDED:
        assert await call(channel, method, metadata) == "UNAUTHENTICATED", method
    assert Service.reached == before


@pytest.mark.parametrize("key", [*KEYS, "wrong"])
async def test_every_known_key_is_compared_in_constant_time(
    channel: grpc.aio.Channel, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def compare_digest(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    await call(channel, METHODS[0], {"x-api-key": key})
    assert compared == list(HASHES)


async def test_several_keys_at_once_are_refused(channel: grpc.aio.Channel) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    for first, second in itertools.product(("wrong", KEYS[0]), (KEYS[1], "wrong")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfo(
                pb.ModelInfoRequest(), metadata=[("x-api-key", first), ("x-api-key", second)]
            )
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "path",
    [
        "/grpc.health.v1.Health/Nothing",
        "/grpc.health.v1.Health/Check/../../fmaas.GenerationService/Generate",
        "/grpc.health.v1.Health/CheckX",
        "/grpc.health.v1.health/Check",
        "//grpc.health.v1.Health/Check",
        "/grpc.health.v1.HealthX/Check",
        "/fmaas.GenerationService/Nothing",
        "/fmaas.GenerationService/",
        "/nothing",
        "/",
    ],
)
async def test_no_path_leads_around(channel: grpc.aio.Channel, path: str) -> None:
    before = Service.reached
    assert await call(channel, path, {}) == "UNAUTHENTICATED"
    assert Service.reached == before


async def test_health_is_open_to_all(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status
    assert (await stub.List(health_pb2.HealthListRequest())).statuses
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status
    watch.cancel()
    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    assert {f"/{service.full_name}/{m.name}" for m in service.methods} == OPEN_METHODS


async def test_refusals_are_counted_and_say_no_more_than_needed(
    channel: grpc.aio.Channel, metrics: Metrics
) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    for metadata, text in (
        ([], "no API key was given"),
        ([("x-api-key", "guess")], "the API key is not accepted"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfo(pb.ModelInfoRequest(), metadata=metadata)
        assert caught.value.details() == text
    assert refused(metrics, "no_key") == refused(metrics, "wrong_key") == 1


async def test_a_call_without_a_message_is_refused_at_once(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    stream = stub.ServerReflectionInfo()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_keys_of_the_moment(tmp_path: Path, metrics: Metrics) -> None:
    path = tmp_path / "keys"
    path.write_text(HASHES[0].hex())
    watched = watch_keys(Config(api_keys_file=str(path)), metrics)
    async with running(Gate(lambda: watched.value, (), metrics)) as channel:
        method, first, second = METHODS[0], GOOD[0], GOOD[1]
        assert await call(channel, method, first) == "OK"
        assert await call(channel, method, second) == "UNAUTHENTICATED"
        path.write_text(HASHES[1].hex())
        watched.refresh()
        assert await call(channel, method, first) == "UNAUTHENTICATED"
        assert await call(channel, method, second) == "OK"
        path.write_text("")  # half written: nobody is locked out
        watched.refresh()
        assert await call(channel, method, second) == "OK"


# ---- the file ----


def test_a_file_of_keys() -> None:
    text = f"# keys\n\n{HASHES[0].hex()}  -\n\t{HASHES[1].hex().upper()} # the second\r\n"
    assert parse_keys([text.encode()]) == HASHES


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no hash"),
        ("# nothing\n", "no hash"),
        (f"{HASHES[0].hex()}\nSECRET", "line 2 is not"),
        (HASHES[0].hex()[:-1], "line 1 is not"),
        (HASHES[0].hex() + "0", "line 1 is not"),
        ("ä" * 64, "line 1 is not"),
        ("\x00\xff", "line 1 is not"),
    ],
)
def test_wrong_files(text: str, why: str, tmp_path: Path, metrics: Metrics) -> None:
    with pytest.raises(BadFileError, match=why):
        parse_keys([text.encode()])
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        watch_keys(Config(api_keys_file=str(path)), metrics)
    assert str(caught.value).startswith(f"--api-keys-file={path}: ")
    assert "SECRET" not in str(caught.value)


# ---- names in client certificates ----


@pytest.mark.parametrize(
    ("alt_names", "allowed"),
    [
        ("DNS:client.example", True),
        ("DNS:CLIENT.example", True),
        ("DNS:other.example,DNS:client.example", True),
        ("URI:spiffe://example/worker", True),
        ("DNS:other.example", False),
        ("DNS:client.example.evil", False),
        ("email:client.example@evil.example", False),
    ],
)
async def test_names(alt_names: str, allowed: bool, tmp_path: Path, metrics: Metrics) -> None:
    authority = Authority(tmp_path)
    server_pair = authority.sign("server")
    client_pair = authority.sign("client.example", alt_names)  # common names do not count
    config = Config(
        host="localhost",
        grpc_port=0,
        tls_cert_path=str(server_pair[0]),
        tls_key_path=str(server_pair[1]),
        tls_client_ca_cert_path=str(authority.cert),
    )
    gate = Gate(None, ["client.example", "spiffe://example/worker"], metrics)
    server = GrpcServer(config, lambda: True, [gate])
    server.add_service(GENERATION_SERVICE, Service())
    port = await server.start(Tls(config, metrics).grpc_credentials())
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(), client_pair[1].read_bytes(), client_pair[0].read_bytes()
    )
    before = Service.reached
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        for method in GUARDED:
            expected = "OK" if allowed else "PERMISSION_DENIED"
            assert await call(channel, method, {}) == expected, method
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
    await server.stop(0)
    assert (Service.reached > before) is allowed
    assert refused(metrics, "client_name") == (0 if allowed else len(GUARDED))
