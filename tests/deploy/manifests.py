"""Manifests as the cluster would get them: rendered by kustomize, and what stands in them."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tgis.config.fields import FIELDS, IGNORED_FIELDS, variable_of

ROOT = Path(__file__).parents[2]
DEPLOYMENT = ROOT / "deployment"
COMPONENTS = sorted(
    str(path.parent.relative_to(DEPLOYMENT / "components"))
    for path in (DEPLOYMENT / "components").rglob("kustomization.yaml")
)
MODELS = sorted(path.parent.name for path in DEPLOYMENT.glob("models/*/kustomization.yaml"))
# Everything that can be applied as it is.
TREES = sorted(
    str(path.parent.relative_to(DEPLOYMENT))
    for path in DEPLOYMENT.rglob("kustomization.yaml")
    if "components" not in path.relative_to(DEPLOYMENT).parts
)
VARIABLES = {
    variable_of(name)
    for field in (*FIELDS.values(), *IGNORED_FIELDS.values())
    for name in field.names
}

Manifest = dict[str, Any]


def renderer() -> list[str]:
    """The command that renders a directory; or skip."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    pytest.skip("neither kustomize nor kubectl is here to render manifests with")


def render(directory: Path) -> list[Manifest]:
    """The manifests of a directory with a kustomization."""
    result = subprocess.run(
        [*renderer(), str(directory)], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "deprecated" not in result.stderr, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@cache
def tree(name: str) -> list[Manifest]:
    """The manifests of a directory below deployment/; not to be changed."""
    return render(DEPLOYMENT / name)


def overlay(directory: Path, base: str, *components: str) -> list[Manifest]:
    """The manifests of an overlay of one's own, made in an empty directory."""
    above = Path(os.path.relpath(DEPLOYMENT, directory.resolve()))
    text = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(above / base)],
        "components": [str(above / "components" / name) for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return render(directory)


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def the(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    (found,) = of_kind(manifests, kind)
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Name and specification of every pod; a runtime of KServe counts, and takes its service's."""
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] in ("Deployment", "Job"):
            yield name, manifest["spec"]["template"]["spec"]
        elif manifest["kind"] == "ServingRuntime":
            predictor = the(manifests, "InferenceService")["spec"]["predictor"]
            inherited = ("terminationGracePeriodSeconds", "enableServiceLinks")
            inherited += ("automountServiceAccountToken",)
            spec = {key: manifest["spec"][key] for key in ("containers", "volumes")}
            yield name, spec | {key: predictor[key] for key in inherited}


def environment(container: Manifest, manifests: list[Manifest]) -> Mapping[str, str]:
    """The variables of a container that have a value in the manifests."""
    maps = {item["metadata"]["name"]: item["data"] for item in of_kind(manifests, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= maps[source["configMapRef"]["name"]]
    return found | {item["name"]: item.get("value", "") for item in container.get("env", ())}
