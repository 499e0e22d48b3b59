"""The Serve config file: what it names exists, and the application can be built from it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import DEPLOYMENT
from tests.kit.ray_cluster import ray_environment, require_ray

from tgis.cluster.options import RayOptions
from tgis.config.fields import FIELDS
from tgis.demo import model_dir

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
