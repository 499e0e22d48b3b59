"""Certificates: what is refused, and that they change under open streams without a loss."""

import asyncio
import calendar
import contextlib
import os
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tests.kit.certificates import Authority, make_certificate

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.front.grpc_server import GENERATION_SERVICE, GrpcServer
from tgis.front.reload import BadFileError
from tgis.front.tls import Tls, make_pair
from tgis.observe.metrics import Limits, Metrics
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc

NUM_ROTATIONS = 100
NUM_STREAMS = 8
STREAM = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="a"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Two certificates of localhost that differ by their names."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    return [make_certificate(folder, folder.name.strip("0")) for folder in folders]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def contents(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def metrics() -> Metrics:
    return Metrics(Limits(16, 8, 4))


def value(of: Metrics, start: str) -> float:
    (line,) = [x for x in of.render().decode().splitlines() if x.startswith(start + " ")]
    return float(line.split()[-1])


# ---- what can be used ----


def test_a_pair_that_fits(pairs: list[tuple[Path, Path]]) -> None:
    cert, key = pairs[0]
    pair = make_pair(contents(cert, key))
    command = ["openssl", "x509", "-enddate", "-noout", "-in", str(cert)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    end = time.strptime(text.strip().removeprefix("notAfter="), "%b %d %H:%M:%S %Y GMT")
    assert pair.expires == calendar.timegm(end)
    assert pair.client_ca is None


def test_expiry_far_away_is_in_another_form(tmp_path: Path) -> None:
    cert, key = tmp_path / "c", tmp_path / "k"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        f" -days 36500 -subj /CN=x -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    expires = make_pair(contents(cert, key)).expires
    assert expires == pytest.approx(time.time() + 36500 * 86400, abs=3600)


def test_what_is_refused(pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    (cert, key), (other, other_key) = (contents(*pair) for pair in pairs)
    locked = tmp_path / "locked"
    command = f"openssl ec -aes128 -passout pass:secret -in {pairs[0][1]} -out {locked}"
    subprocess.run(command.split(), check=True, capture_output=True)
    for bad in (
        [cert, other_key],
        [other, key],
        [cert[: len(cert) // 2], key],
        [cert, key[: len(key) // 2]],
        [cert, b""],
        [b"", key],
        [b"\xff" * 1000, key],
        [key, cert],
        [cert, locked.read_bytes()],
        [cert, key, b""],
        [cert, key, b"not a certificate"],
        [cert, key, b"\xff"],
        [cert, key, cert[: len(cert) // 2]],
    ):
        with pytest.raises(BadFileError) as caught:
            make_pair(bad)
        assert str(caught.value)
        assert len(str(caught.value)) < 200


def test_wrong_files_at_the_start_are_a_clear_error(pairs: list[tuple[Path, Path]]) -> None:
    config = Config(tls_cert_path=str(pairs[0][0]), tls_key_path=str(pairs[1][1]))
    with pytest.raises(ConfigError, match=r"--tls-cert-path=.*--tls-key-path=.*mismatch"):
        Tls(config, metrics())


# ---- a server that uses them ----


class Service(generation_pb2_grpc.GenerationServiceServicer):
    """Streams until told to stop."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()

    async def GenerateStream(self, request, context):
        count = 0
        while not self.stop.is_set():
            count += 1
            yield pb.GenerationResponse(generated_token_count=count)
            await asyncio.sleep(0.005)
        yield pb.GenerationResponse(stop_reason=pb.MAX_TOKENS)

    Generate = Tokenize = None

    async def ModelInfo(self, request, context):
        return pb.ModelInfoResponse(max_new_tokens=5)


class Here:
    """A server with TLS whose files are to be changed."""

    def __init__(self, folder: Path, pair: tuple[Path, Path], ca: Path | None = None) -> None:
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"
        self.put(pair)
        self.metrics = metrics()
        config = Config(
            host="localhost",
            grpc_port=0,
            tls_cert_path=str(self.cert),
            tls_key_path=str(self.key),
            tls_client_ca_cert_path=None if ca is None else str(ca),
        )
        self.tls = Tls(config, self.metrics)
        self.server = GrpcServer(config, lambda: True)
        self.service = Service()
        self.server.add_service(GENERATION_SERVICE, self.service)
        self.port = 0

    def put(self, pair: tuple[Path, Path]) -> None:
        """Rewrite both files in place."""
        self.cert.write_bytes(pair[0].read_bytes())
        self.key.write_bytes(pair[1].read_bytes())

    async def presented(self) -> bytes:
        """The certificate that a new handshake gets, in DER."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("localhost", self.port, ssl=context)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()
        return der

    def channel(self, trusted: bytes, pair: tuple[Path, Path] | None = None) -> grpc.aio.Channel:
        chain, key = (pair[0].read_bytes(), pair[1].read_bytes()) if pair else (None, None)
        credentials = grpc.ssl_channel_credentials(trusted, key, chain)
        # Channels that differ share no connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options)


@contextlib.asynccontextmanager
async def listening(here: Here) -> AsyncIterator[Here]:
    here.port = await here.server.start(here.tls.grpc_credentials())
    try:
        yield here
    finally:
        here.service.stop.set()
        await here.server.stop(0)


def der(pair: tuple[Path, Path]) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair[0].read_text())


def rotate_in_place(here: Here, pair: tuple[Path, Path]) -> None:
    here.cert.write_bytes(pair[0].read_bytes())
    here.tls.watched.refresh()  # the key does not fit yet
    here.key.write_bytes(pair[1].read_bytes()[:50])
    here.tls.watched.refresh()  # half written
    here.key.write_bytes(pair[1].read_bytes())
    here.tls.watched.refresh()


def rotate_by_rename(here: Here, pair: tuple[Path, Path]) -> None:
    for path, new in ((here.key, pair[1]), (here.cert, pair[0])):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(new.read_bytes())
        fresh.rename(path)
    here.tls.watched.refresh()


def rotate_by_link(here: Here, pair: tuple[Path, Path]) -> None:
    folder = here.cert.parent
    version = folder / f"..{time.monotonic_ns()}"
    version.mkdir()
    for path, new in ((here.cert, pair[0]), (here.key, pair[1])):
        (version / path.name).write_bytes(new.read_bytes())
    (folder / "..tmp").symlink_to(version.name)
    (folder / "..tmp").rename(folder / "..data")
    for path in (here.cert, here.key):
        if not path.is_symlink():
            path.unlink()
            path.symlink_to(Path("..data") / path.name)
    here.tls.watched.refresh()


async def test_rotations_under_load_drop_no_stream(
    pairs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    trusted = b"".join(pair[0].read_bytes() for pair in pairs)
    async with listening(Here(tmp_path, pairs[0])) as here:
        channels = [here.channel(trusted) for _ in range(NUM_STREAMS)]
        calls = [
            generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(STREAM)
            for channel in channels
        ]

        async def read(rest) -> int:
            reasons = [message.stop_reason async for message in rest]
            assert reasons[-1] == pb.MAX_TOKENS
            return len(reasons)

        messages = [aiter(call) for call in calls]
        for first in messages:
            await anext(first)
        readers = [asyncio.create_task(read(rest)) for rest in messages]
        third = NUM_ROTATIONS // 3
        ways = [rotate_in_place] * third + [rotate_by_rename] * third
        ways += [rotate_by_link] * (NUM_ROTATIONS - len(ways))
        for number, rotate in enumerate(ways, 1):
            pair = pairs[number % 2]
            rotate(here, pair)
            assert await here.presented() == der(pair), (number, rotate.__name__)
            if number % 10 == 0:
                async with here.channel(trusted) as channel:
                    stub = generation_pb2_grpc.GenerationServiceStub(channel)
                    assert (await stub.ModelInfo(pb.ModelInfoRequest())).max_new_tokens == 5
        assert not any(reader.done() for reader in readers)
        here.service.stop.set()
        assert min(await asyncio.gather(*readers)) > 1
        for channel in channels:
            await channel.close()
    start = 'tgi_credentials_reload_count_total{file="tls",result='
    assert value(here.metrics, start + '"success"}') == NUM_ROTATIONS
    assert value(here.metrics, start + '"failure"}') == 2 * third
    expires = value(here.metrics, "tgi_tls_certificate_expiry_seconds")
    assert expires == make_pair(contents(*pairs[NUM_ROTATIONS % 2])).expires


async def test_garbage_keeps_the_old_pair(pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    async with listening(Here(tmp_path, pairs[0])) as here:
        for damage in (b"", b"\xff" * 100, b"-----BEGIN CERTIFICATE-----\n"):
            here.cert.write_bytes(damage)
            here.tls.watched.refresh()
            assert await here.presented() == der(pairs[0])
        here.cert.unlink()
        here.tls.watched.refresh()
        assert await here.presented() == der(pairs[0])
        here.put(pairs[1])
        here.tls.watched.refresh()
        assert await here.presented() == der(pairs[1])


async def test_clients_must_have_a_certificate_of_the_authority(
    authority: Authority, tmp_path: Path
) -> None:
    pair, client = authority.sign("server"), authority.sign("client", "DNS:client.example")
    stranger = make_certificate(tmp_path, "stranger")
    folder = tmp_path / "here"
    folder.mkdir()
    async with listening(Here(folder, pair, authority.cert)) as here:
        trusted = authority.cert.read_bytes()
        for own, code in ((client, None), (None, "UNAVAILABLE"), (stranger, "UNAVAILABLE")):
            async with here.channel(trusted, own) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                if code is None:
                    await stub.ModelInfo(pb.ModelInfoRequest())
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ModelInfo(pb.ModelInfoRequest())
                assert caught.value.code().name == code


async def test_another_authority_of_clients_is_taken_up(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    pair, theirs = authority.sign("server2"), other.sign("their-client")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.cert.read_bytes())
    folder = tmp_path / "here"
    folder.mkdir()
    async with listening(Here(folder, pair, ca)) as here:

        async def call() -> None:
            async with here.channel(authority.cert.read_bytes(), theirs) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                await stub.ModelInfo(pb.ModelInfoRequest())

        with pytest.raises(grpc.aio.AioRpcError):
            await call()
        os.truncate(ca, 100)
        here.tls.watched.refresh()
        with pytest.raises(grpc.aio.AioRpcError):
            await call()
        ca.write_bytes(other.cert.read_bytes())
        here.tls.watched.refresh()
        await call()


async def test_an_http_context_follows(pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    here = Here(tmp_path, pairs[0])
    server = await asyncio.start_server(
        lambda reader, writer: writer.close(), "localhost", 0, ssl=here.tls.http_context()
    )
    here.port = server.sockets[0].getsockname()[1]
    assert await here.presented() == der(pairs[0])
    rotate_in_place(here, pairs[1])
    assert await here.presented() == der(pairs[1])
    server.close()
    await server.wait_closed()
