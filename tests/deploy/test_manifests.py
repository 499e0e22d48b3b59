"""Every manifest is valid, restricted, and says what the server's tables say."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.deploy.manifests import (
    COMPONENTS,
    MODELS,
    ROOT,
    TREES,
    VARIABLES,
    Manifest,
    environment,
    of_kind,
    overlay,
    pods,
    the,
    tree,
)

from tgis.config import LAUNCHER, SERVE, Config, parse
from tgis.config.fields import FIELDS, IGNORED_FIELDS, variable_of
from tgis.observe.table import TABLE

RELEASES = ("1.29", "1.37")  # of Kubernetes: the oldest and the newest that must take them
CRDS = yaml.safe_load((Path(__file__).parent / "crds.yaml").read_text())
NOT_OURS = {"HF_TOKEN"}  # the hub's, for downloads
WRITABLE = {"/tmp", "/home/tgis"}
HEALTH_PERIODS = {"startupProbe": 5, "readinessProbe": 5, "livenessProbe": 30}
MINUTE = 60

schema_contents = cache(kubernetes_validate.utils.schema_contents)


def crd_schema(kind: str) -> Manifest:
    definition = CRDS[kind]
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": definition["apiVersion"]},
            "kind": {"const": kind},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": definition["spec"],
        },
        "$defs": CRDS["$defs"],
    }


@pytest.fixture(autouse=True)
def _read_schemas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", schema_contents)


def validate(manifest: Manifest) -> None:
    kind = manifest["kind"]
    if kind not in CRDS:
        for release in RELEASES:
            kubernetes_validate.validate(manifest, release, strict=True)
        return
    jsonschema.validate(manifest, crd_schema(kind))
    spec = manifest["spec"]
    meta: Manifest = {"metadata": {"name": "x"}}
    if kind == "ServingRuntime":
        pod = {key: spec[key] for key in ("containers", "volumes")}
        validate({"apiVersion": "v1", "kind": "Pod", **meta, "spec": pod})
    if kind == "ScaledObject":
        config = spec["advanced"]["horizontalPodAutoscalerConfig"]
        target = {"kind": "Deployment", **spec["scaleTargetRef"]}
        scaler = {"scaleTargetRef": target, "maxReplicas": 1, "behavior": config["behavior"]}
        api = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
        validate({**api, **meta, "spec": scaler})


def check_restricted(spec: Manifest) -> None:
    """The rules of the pod security standard "restricted", and a read-only root on top."""
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for volume in spec["volumes"]:
        (source,) = set(volume) - {"name"}
        assert source in ("emptyDir", "secret", "configMap", "persistentVolumeClaim"), volume
    for container in spec["containers"]:
        own, pod = container["securityContext"], spec.get("securityContext", {})
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
        assert not own.get("privileged", False)
        assert {**pod, **own}["runAsNonRoot"] is True
        assert {**pod, **own}["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "runAsUser" not in {**pod, **own}, "any user will do: OpenShift chooses one"
        empty = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
        mounts = {item["mountPath"] for item in container["volumeMounts"] if item["name"] in empty}
        assert mounts >= WRITABLE
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False


def check_probes(container: Manifest, config: Config) -> None:
    ports = {item["name"]: item["containerPort"] for item in container["ports"]}
    for name, period in HEALTH_PERIODS.items():
        probe = container[name]
        port = probe["httpGet"]["port"]
        assert probe["httpGet"]["path"] == "/health"
        assert ports.get(port, port) == config.port
        assert probe["timeoutSeconds"] == 1
        assert probe["periodSeconds"] == period
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 30 * MINUTE
    # The server itself needs this long to notice a hung core, and then loads the model again.
    liveness = container["livenessProbe"]
    assert liveness["failureThreshold"] * liveness["periodSeconds"] > 10 * config.hang_timeout
    assert config.grpc_port in ports.values()


def settings(container: Manifest, manifests: list[Manifest], file: Path) -> Config:
    """What the server makes of a container's environment; files exist, as they will there."""
    file.touch()
    env = dict(environment(container, manifests))
    for field in FIELDS.values():
        if field.rule == "the path of a readable file":
            env |= {key: str(file) for key in map(variable_of, field.names) if key in env}
        if field.setting.not_yet:  # refused by this version, but a setting all the same
            env = {key: text for key, text in env.items() if key != variable_of(field.name)}
    program = SERVE if container.get("command", ())[:2] == ["tgis", "serve"] else LAUNCHER
    return parse(container.get("args", []), env, program)


def check_server(spec: Manifest, manifests: list[Manifest], file: Path) -> None:
    (container,) = spec["containers"]
    config = settings(container, manifests, file)
    assert config.host == "0.0.0.0"
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    check_probes(container, config)
    (_, pause) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert spec["terminationGracePeriodSeconds"] > config.drain_timeout + int(pause) + 30
    ignored = {variable_of(name) for field in IGNORED_FIELDS.values() for name in field.names}
    assert not ignored & set(environment(container, manifests))
    devices = container["resources"]["limits"].get("nvidia.com/gpu")
    assert (devices is not None) == container["image"].endswith("-cuda")
    assert int(devices or 1) == config.num_shard
    if config.num_shard > 1:
        assert "/dev/shm" in {item["mountPath"] for item in container["volumeMounts"]}


def selected(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def check_selectors(manifests: list[Manifest]) -> None:
    """Each object means the pods of its own deployment, and no other model's."""
    deployment = the(manifests, "Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    (spread,) = template["spec"]["topologySpreadConstraints"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        the(manifests, "Service")["spec"]["selector"],
        the(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selected(selector, labels)
        assert selector["app"] == labels["app"]
    ports = {item["name"] for item in template["spec"]["containers"][0]["ports"]}
    named = {item["targetPort"] for item in the(manifests, "Service")["spec"]["ports"]}
    (rule,) = the(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert named == ports == {item["port"] for item in rule["ports"]}


def samples(text: str) -> set[str]:
    return set(re.findall(r"\btgi_\w+", text))


def check(manifests: list[Manifest], file: Path) -> None:
    """Everything that holds wherever it can be told."""
    identities = [(item["kind"], item["metadata"]["name"]) for item in manifests]
    assert len(identities) == len(set(identities))
    for manifest in manifests:
        validate(manifest)
    for name, spec in pods(manifests):
        check_restricted(spec)
        for container in spec["containers"]:
            unknown = set(environment(container, manifests)) - VARIABLES
            assert unknown <= (NOT_OURS if name.startswith("Job/") else set()), name
            image, _, tag = container["image"].partition(":")
            assert image == "text-gen-server"
            assert tag
            assert tag != "latest"
        if not name.startswith("Job/"):
            check_server(spec, manifests, file)
    if of_kind(manifests, "Deployment"):
        check_selectors(manifests)


@pytest.mark.parametrize("name", TREES)
def test_what_can_be_applied(name: str, tmp_path: Path) -> None:
    check(tree(name), tmp_path / "file")


@pytest.mark.parametrize("name", COMPONENTS)
def test_each_component_on_a_model(name: str, tmp_path: Path) -> None:
    plain, more = tree("models/demo"), overlay(tmp_path, "models/demo", name)
    check(more, tmp_path / "file")
    assert more != plain


def test_all_components_together(tmp_path: Path) -> None:
    rivals = ("hpa", "gpus/2", "gpus/4", "gpus/8", "gpu-products/h100-80g")
    chosen = [name for name in COMPONENTS if name not in rivals]
    manifests = overlay(tmp_path, "models/demo", *chosen)
    check(manifests, tmp_path / "file")
    (container,) = the(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    mounts = [item["mountPath"] for item in container["volumeMounts"]]
    assert len(mounts) == len(set(mounts)) == 2 + 7


def test_models_do_not_meet() -> None:
    deployments = [the(tree(f"models/{name}"), "Deployment") for name in MODELS]
    apps = [item["spec"]["selector"]["matchLabels"]["app"] for item in deployments]
    names = [item["metadata"]["name"] for item in deployments]
    assert names == [f"{name}-inference-server" for name in MODELS]
    assert apps == [f"text-gen-{name}" for name in MODELS]


def test_network_policy_lets_nothing_out() -> None:
    policy = the(tree("base"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy


@pytest.mark.parametrize("name", ["hpa", "keda"])
def test_autoscalers_read_metrics_that_exist(name: str, tmp_path: Path) -> None:
    manifests = overlay(tmp_path, "models/bloom-560m", name)
    kind = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}[name]
    scaler, deployment = the(manifests, kind), the(manifests, "Deployment")
    target = "bloom-560m-inference-server"
    assert deployment["metadata"]["name"] == target
    assert "replicas" not in deployment["spec"]
    assert scaler["metadata"]["name"] == scaler["spec"]["scaleTargetRef"]["name"] == target
    found = samples(yaml.safe_dump(scaler))
    assert found == {"tgi_queue_size", "tgi_kv_cache_usage"}
    assert found <= {spec.name for spec in TABLE if spec.kind == "gauge"}
    if name == "keda":
        queries = [trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"]]
        assert all(f'service="{target}"' in query for query in queries)
        assert the(manifests, "Service")["metadata"]["name"] == target


def test_monitoring_is_that_of_the_alerts() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "alerts" / "tgis.rules.yaml").read_text())
    assert the(tree("monitoring"), "PrometheusRule")["spec"] == rules
    command = [sys.executable, ROOT / "deploy" / "generate_prometheus_rule.py", "--check"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    monitor = the(tree("monitoring"), "ServiceMonitor")["spec"]
    service = the(tree("models/demo"), "Service")
    assert selected(monitor["selector"]["matchLabels"], service["metadata"]["labels"])
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    (relabeling,) = endpoint["relabelings"]
    jobs = set(re.findall(r'job="(\w+)"', yaml.safe_dump(rules)))
    assert jobs == {relabeling["replacement"]} == {"tgis"}
    assert relabeling["targetLabel"] == "job"


def test_the_downloaded_model_is_where_servers_look(tmp_path: Path) -> None:
    job = the(tree("storage/download"), "Job")["spec"]["template"]["spec"]
    (container,) = job["containers"]
    env = environment(container, tree("storage/download"))
    claim = the(tree("storage/hub-cache"), "PersistentVolumeClaim")["metadata"]["name"]
    server = overlay(tmp_path, "models/demo", "hub-cache")
    pod = the(server, "Deployment")["spec"]["template"]["spec"]
    for spec in (job, pod):
        (volume,) = (item for item in spec["volumes"] if "persistentVolumeClaim" in item)
        assert volume["persistentVolumeClaim"]["claimName"] == claim
        (mount,) = (x for x in spec["containers"][0]["volumeMounts"] if x["name"] == volume["name"])
        assert mount["mountPath"] == env["HF_HUB_CACHE"]
    assert container["command"] == ["text-generation-server", "download-weights"]
    assert container["args"] == ["$(MODEL_NAME)"]


MISTAKES: dict[str, Any] = {
    "misspelt field of a pod": ("Deployment", "spec.template.spec.enableServiceLink", False),
    "misspelt field of a monitor": ("ServiceMonitor", "spec.endpoint", []),
    "text for a number": ("Deployment", "spec.replicas", "one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_validation_finds_mistakes(mistake: str) -> None:
    kind, path, value = MISTAKES[mistake]
    source = {"Deployment": "base", "ServiceMonitor": "monitoring"}[kind]
    broken = yaml.safe_load(yaml.safe_dump(the(tree(source), kind)))
    *parents, last = path.split(".")
    place = broken
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)
