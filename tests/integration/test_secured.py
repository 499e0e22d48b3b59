"""One server with everything on: mutual TLS, API keys, TLS for HTTP, traces, a bounded drain."""

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.kit.certificates import Authority
from tests.kit.processes import wait_until
from tests.kit.server import READY_SECONDS, Server, start_server

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
trace_grpc = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")

KEY = "a-long-random-key"
SECRET = "Zanzibar"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
METADATA = [
    ("authorization", f"Bearer {KEY}"),
    ("x-correlation-id", "corr-7"),
    ("traceparent", f"00-{TRACE}-{PARENT}-01"),
]


@dataclass
class Receiver:
    """An OTLP endpoint that keeps the spans it gets."""

    spans: list[Any] = field(default_factory=list)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service.ExportTraceServiceResponse()


@dataclass
class House:
    server: Server
    authority: Authority
    client: tuple[Path, Path]
    files: Path
    receiver: Receiver

    def put(self, pair: tuple[Path, Path]) -> None:
        for path, new in zip((self.files / "tls.crt", self.files / "tls.key"), pair, strict=True):
            path.write_bytes(new.read_bytes())

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator[pb_grpc.GenerationServiceStub]:
        async with self.channel() as channel:
            yield pb_grpc.GenerationServiceStub(channel)

    def channel(self) -> grpc.aio.Channel:
        chain, key = (path.read_bytes() for path in self.client)
        credentials = grpc.ssl_channel_credentials(self.authority.cert.read_bytes(), key, chain)
        options = [("grpc.ssl_target_name_override", "localhost")]
        return grpc.aio.secure_channel(self.server.grpc, credentials, options)

    def get(self, path: str) -> tuple[int, str]:
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        context.check_hostname = False
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        url = self.server.http.replace("http:", "https:") + path
        try:
            with urllib.request.urlopen(url, timeout=10, context=context) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def serial(self) -> int:
        """Which certificate a new handshake with the gRPC port gets."""
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        context.check_hostname = False
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(*self.client)
        host, _, port = self.server.grpc.rpartition(":")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain) as sock,
        ):
            certificate = sock.getpeercert()
        assert certificate is not None
        return int(str(certificate["serialNumber"]), 16)


@pytest.fixture(scope="module")
def house(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    files = tmp_path_factory.mktemp("secured")
    authority = Authority(files)
    receiver = Receiver()
    collector = grpc.server(ThreadPoolExecutor(2))
    trace_grpc.add_TraceServiceServicer_to_server(receiver, collector)
    endpoint = f"http://127.0.0.1:{collector.add_insecure_port('127.0.0.1:0')}"
    collector.start()
    client = authority.sign("client", "DNS:client.example")
    (files / "keys").write_text(hashlib.sha256(KEY.encode()).hexdigest() + "\n")
    flags = ["--tls-cert-path", files / "tls.crt", "--tls-key-path", files / "tls.key"]
    flags += ["--tls-client-ca-cert-path", authority.cert, "--tls-client-names", "client.example"]
    flags += ["--api-keys-file", files / "keys", "--otlp-endpoint", endpoint, "--tls-http"]
    flags += ["--no-log-prompts", "--log-format", "json", "--drain-timeout", "1"]
    house = House(None, authority, client, files, receiver)  # type: ignore[arg-type]
    house.put(authority.sign("first"))
    house.server = start_server(demo_model_dir, files, *map(str, flags))
    try:
        wait_until(lambda: is_ready(house), READY_SECONDS)
        yield house
    finally:
        if house.server.process.poll() is None:
            house.server.kill()
        collector.stop(None).wait()


def is_ready(house: House) -> bool:
    assert house.server.process.poll() is None, house.server.tail()
    try:
        return house.get("/health")[0] == 200
    except OSError:
        return False


def request(tokens: int = 5) -> pb.SingleGenerationRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=tokens, min_new_tokens=tokens)
    return pb.SingleGenerationRequest(
        request=pb.GenerationRequest(text=SECRET), params=pb.Parameters(stopping=stopping)
    )


async def test_a_request_leaves_a_span_and_no_text(house: House) -> None:
    async with house.stub() as stub:
        messages = [m async for m in stub.GenerateStream(request(), metadata=METADATA)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfo(pb.ModelInfoRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await asyncio.to_thread(wait_until, lambda: house.receiver.spans)
    (span,) = house.receiver.spans
    assert span.name == "generate_stream"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    found = {pair.key: pair.value for pair in span.attributes}
    assert found["gen_ai.usage.input_tokens"].int_value == messages[0].input_token_count
    assert found["gen_ai.usage.output_tokens"].int_value == 5
    assert found["correlation_id"].string_value == "corr-7"
    names = [event.name for event in span.events]
    assert names == ["validated", "inference started", "first token", "last token"]
    times = [event.time_unix_nano for event in span.events]
    assert times == sorted(times)
    assert span.start_time_unix_nano <= times[0]
    assert times[-1] <= span.end_time_unix_nano
    assert SECRET not in str(span)
    lines = [json.loads(line) for line in house.server.log().splitlines()]
    (line,) = (line for line in lines if line.get("span", {}).get("correlation_id") == "corr-7")
    assert line["message"].startswith("Streaming response generated 5 tokens before MaxTokens")
    assert SECRET not in house.server.log()
    assert line["message"].endswith("bytes")
    assert KEY not in house.server.log()


async def test_a_new_certificate_is_presented_on_both_ports(house: House) -> None:
    first = await asyncio.to_thread(house.serial)
    async with house.stub() as stub:
        await stub.ModelInfo(pb.ModelInfoRequest(), metadata=METADATA)
        new = house.authority.sign("second")
        (house.files / "tls.crt").write_bytes(new[0].read_bytes()[:100])

        def kept() -> bool:
            name = 'tgi_credentials_reload_count_total{file="tls",result="failure"} '
            return name + "0.0" not in house.get("/metrics")[1]

        await asyncio.to_thread(wait_until, kept)
        assert await asyncio.to_thread(house.serial) == first
        house.put(new)
        await asyncio.to_thread(wait_until, lambda: house.serial() != first)
        await stub.ModelInfo(pb.ModelInfoRequest(), metadata=METADATA)
    assert (await asyncio.to_thread(house.get, "/health"))[0] == 200


async def test_a_client_of_another_name_is_refused(house: House) -> None:
    house.client, own = house.authority.sign("other", "DNS:other.example"), house.client
    try:
        async with house.stub() as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfo(pb.ModelInfoRequest(), metadata=METADATA)
    finally:
        house.client = own
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_what_the_drain_cuts_off_is_unavailable(house: House) -> None:
    """Last, since it ends the server."""
    async with house.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        serving = health_pb2.HealthCheckResponse
        assert (await watch.read()).status == serving.SERVING
        stub = pb_grpc.GenerationServiceStub(channel)
        # As many as the model computes in more than the second that they get.
        calls = [stub.GenerateStream(request(900), metadata=METADATA) for _ in range(60)]
        for call in calls:
            await call.read()
        house.server.process.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == serving.NOT_SERVING
        codes = []
        for call in calls:
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            codes.append((await call.code(), await call.details()))
    cut_off = [details for code, details in codes if code is grpc.StatusCode.UNAVAILABLE]
    assert cut_off
    assert set(cut_off) == {"The server is shutting down"}
    assert {code.name for code, _ in codes} <= {"OK", "UNAVAILABLE"}
    assert await asyncio.to_thread(house.server.process.wait, 30) == 0
    assert "before Cancelled" not in house.server.log()
    assert "exception" not in house.server.log()


def test_tracing_without_its_packages_ends_the_start(tmp_path: Path) -> None:
    hook = tmp_path / "sitecustomize.py"
    hook.write_text("import sys\nsys.modules['opentelemetry'] = None\n")
    command = [sys.executable, "-m", "tgis.cli.main", "serve", "--port=0", "--grpc-port=0"]
    result = subprocess.run(
        [*command, "--otlp-endpoint=http://localhost:1", f"--termination-log={tmp_path}/log"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install 'tgis[otlp]'" in line
    assert (tmp_path / "log").read_text().strip() in line
