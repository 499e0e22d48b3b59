"""A real server: what happens when it starts, is killed in part or whole, and is told to stop."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.kit.client import Status, connect, connect_blocking
from tests.kit.processes import alive, children, open_files, wait_until
from tests.kit.server import Server, run_server, start_server

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

LONG = {"stopping": {"maxNewTokens": 400, "minNewTokens": 400}}
PROMPT = {"text": "Once upon a time"}


@pytest.fixture
def server(demo_model_dir: Path) -> Iterator[Server]:
    with run_server(demo_model_dir) as running:
        yield running


def generate(server: Server, tokens: int = 5) -> dict[str, object] | Status:
    stopping = {"maxNewTokens": tokens, "minNewTokens": tokens}
    with connect_blocking(server.grpc) as client:
        return client.call("Generate", {"requests": [PROMPT], "params": {"stopping": stopping}})


def grpc_health(server: Server, service: str = "") -> str:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return name


async def begin(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamCall:
    """A long stream of which the first token has come."""
    request = ParseDict({"request": PROMPT, "params": LONG}, pb.SingleGenerationRequest())
    call = pb_grpc.GenerationServiceStub(channel).GenerateStream(request)
    while not (await call.read()).generated_token_count:
        pass
    return call


async def outcome(call: grpc.aio.UnaryStreamCall) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        metadata = {key: str(value) for key, value in error.trailing_metadata() or ()}
        return error.code(), error.details() or "", metadata
    return grpc.StatusCode.OK, "", {}


def test_health_and_metrics_of_a_ready_server(server: Server) -> None:
    assert server.get("/health") == (200, "")
    assert grpc_health(server) == "SERVING"
    assert grpc_health(server, "fmaas.GenerationService") == "SERVING"
    assert isinstance(generate(server), dict)
    status, text = server.get("/metrics")
    assert status == 200
    assert 'tgi_request_success_total{stop_reason="MAX_TOKENS",kind="single"} 1.0' in text
    assert "tgi_request_generated_tokens_count 1.0" in text
    assert "tgi_request_generated_tokens_sum 5.0" in text
    assert server.get("/nothing") == (404, "")


async def test_a_killed_core_ends_all_streams_and_is_replaced(server: Server) -> None:
    pids = children(server.process.pid)
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        calls = [await begin(channel) for _ in range(8)]
        os.kill(pids["tgis.core"], signal.SIGKILL)
        outcomes = await asyncio.gather(*(outcome(call) for call in calls))
    for code, details, metadata in outcomes:
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "died" in details
        assert int(metadata["retry-after-ms"]) > 0
    server.wait_ready()
    assert isinstance(generate(server), dict)
    after = children(server.process.pid)
    assert after["tgis.front"] == pids["tgis.front"]
    assert after["tgis.core"] != pids["tgis.core"]


def test_requests_while_there_is_no_core_are_unavailable(server: Server) -> None:
    os.kill(children(server.process.pid)["tgis.core"], signal.SIGKILL)
    wait_until(lambda: server.get("/health")[0] == 503)
    answer = generate(server)
    assert isinstance(answer, Status)
    assert answer.code == "UNAVAILABLE"
    server.wait_ready()
    assert isinstance(generate(server), dict)


def test_a_stopped_core_is_noticed_and_replaced(demo_model_dir: Path) -> None:
    with run_server(demo_model_dir, "--hang-timeout", "2") as server:
        core = children(server.process.pid)["tgis.core"]
        os.kill(core, signal.SIGSTOP)
        wait_until(lambda: not alive(core))
        wait_until(lambda: isinstance(generate(server), dict))  # the front may not know yet


async def test_open_requests_finish_after_sigterm(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        calls = [await begin(channel) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        outcomes = await asyncio.gather(*(outcome(call) for call in calls))
    assert [code for code, _, _ in outcomes] == [grpc.StatusCode.OK] * 4
    assert await asyncio.to_thread(server.process.wait, 20) == 0
    server.process.poll = lambda: None  # type: ignore[method-assign]
    server.stop = lambda timeout=0.0: 0  # type: ignore[method-assign, misc]
    server.kill = lambda: None  # type: ignore[method-assign]


async def test_a_second_signal_ends_at_once(demo_model_dir: Path, tmp_path: Path) -> None:
    server = start_server(demo_model_dir, tmp_path, "--drain-timeout", "600")
    try:
        await asyncio.to_thread(server.wait_ready)
        pids = children(server.process.pid)
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            calls = [await begin(channel) for _ in range(8)]
            server.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            status, body = await asyncio.to_thread(server.get, "/health")
            assert (status, json.loads(body)["state"]) == (503, "draining")
            os.kill(pids["tgis.core"], signal.SIGSTOP)  # they shall not finish
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait, 20) == 128 + signal.SIGTERM
            outcomes = await asyncio.gather(*(outcome(call) for call in calls))
        assert {code for code, _, _ in outcomes} <= {
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.OK,
        }
        wait_until(lambda: not any(alive(child) for child in pids.values()))
    finally:
        if server.process.poll() is None:
            server.kill()


async def test_a_cancelled_stream_frees_everything(server: Server) -> None:
    front = children(server.process.pid)["tgis.front"]

    def gauge(name: str) -> float:
        lines = server.get("/metrics")[1].splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])

    async with grpc.aio.insecure_channel(server.grpc) as channel:
        first = await begin(channel)
        files = open_files(front)
        calls = [await begin(channel) for _ in range(7)]
        for call in [first, *calls]:
            call.cancel()
        async with connect(server.grpc) as client:
            short = {"requests": [PROMPT], "params": {"stopping": {"maxNewTokens": 1}}}
            while gauge("tgi_batch_current_size") or gauge("tgi_kv_cache_usage"):
                assert isinstance(await client.call("Generate", short), dict)
    assert open_files(front) <= files + 2
    _, text = await asyncio.to_thread(server.get, "/metrics")
    assert 'tgi_request_failure_total{err="cancelled"} 8.0' in text


def test_a_second_server_does_not_share_the_ports(
    server: Server, demo_model_dir: Path, tmp_path: Path
) -> None:
    port = server.grpc.rpartition(":")[2]
    http_port = server.http.rpartition(":")[2]
    for ports in ({"grpc_port": int(port)}, {"http_port": int(http_port)}):
        second = start_server(demo_model_dir, tmp_path, **ports)
        assert second.process.wait(30) == 2
        (line,) = [x for x in second.log().splitlines() if x.startswith("tgis serve:")]
        assert str(*ports.values()) in line
        assert "port" in line
        assert "Traceback" not in second.log()
    assert isinstance(generate(server), dict)


@pytest.mark.parametrize("victim", ["supervisor", "front"])
def test_no_orphans_when_a_process_is_killed(
    demo_model_dir: Path, tmp_path: Path, victim: str
) -> None:
    server = start_server(demo_model_dir, tmp_path, "--termination-log", str(tmp_path / "reason"))
    try:
        server.wait_ready()
        pids = children(server.process.pid)
        pid = server.process.pid if victim == "supervisor" else pids["tgis.front"]
        os.kill(pid, signal.SIGKILL)
        code = server.process.wait(20)
        assert code == (-signal.SIGKILL if victim == "supervisor" else 1)
        wait_until(lambda: not any(alive(child) for child in pids.values()))
        if victim == "front":
            reason = "tgis serve: the front died (SIGKILL)"
            assert server.log().rstrip().endswith(reason)
            assert (tmp_path / "reason").read_text() == "the front died (SIGKILL)\n"
    finally:
        if server.process.poll() is None:
            server.kill()


def test_sigint_while_loading_ends_with_0(demo_model_dir: Path, tmp_path: Path) -> None:
    server = start_server(demo_model_dir, tmp_path)
    wait_until(lambda: "started core" in server.log())
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == 0


def broken_model(directory: Path, demo: Path, damage: str) -> Path:
    """A copy of the demo model with something wrong."""
    path = directory / "model"
    path.mkdir()
    for file in demo.iterdir():
        if file.is_file():
            (path / file.name).write_bytes(file.read_bytes())
    match damage:
        case "no directory":
            return directory / "nowhere"
        case "no config":
            (path / "config.json").unlink()
        case "no weights":
            (path / "model.safetensors").unlink()
        case "truncated weights":
            data = (path / "model.safetensors").read_bytes()
            (path / "model.safetensors").write_bytes(data[: len(data) // 2])
        case "garbage weights":
            (path / "model.safetensors").write_bytes(b"\xff" * 1000)
        case "other shapes":
            text = (path / "config.json").read_text()
            (path / "config.json").write_text(
                text.replace('"num_hidden_layers": ', '"num_hidden_layers": 1')
            )
        case "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (path / name).unlink()
    return path


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        ("no directory", "nowhere"),
        ("no config", "config.json"),
        ("no weights", "safetensors"),
        ("truncated weights", "model.safetensors"),
        ("garbage weights", "model.safetensors"),
        ("other shapes", "layers"),
        ("no tokenizer", "tokenizer"),
    ],
)
def test_a_broken_model_is_one_line_and_an_exit_code(
    demo_model_dir: Path, tmp_path: Path, damage: str, names: str
) -> None:
    model = broken_model(tmp_path, demo_model_dir, damage)
    server = start_server(model, tmp_path)
    assert server.process.wait(60) in (1, 2)
    (line,) = [x for x in server.log().splitlines() if x.startswith("tgis serve:")]
    assert names in line
    assert "Traceback" not in server.log()


def test_a_wrong_setting_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    server = start_server(Path("demo"), tmp_path, "--max-new-tokens", "0")
    assert server.process.wait(20) == 2
    assert server.log().count("\n") == 1
    assert "max_new_tokens" in server.log()


@pytest.mark.parametrize("name", ["tgis", "text-generation-launcher", "grpc_healthcheck"])
def test_help_of_every_command(name: str) -> None:
    command = [Path(sys.executable).parent / name, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    assert "usage" in result.stdout.lower()
