"""docs/deploy.md names only what exists, and its tables are those of the manifests."""

import ast
import os
import re
import subprocess
from pathlib import Path

import yaml
from tests.deploy.manifests import (
    COMPONENTS,
    DEPLOYMENT,
    MODELS,
    ROOT,
    TREES,
    VARIABLES,
    environment,
    render,
    the,
    tree,
)
from tests.deploy.test_manifests import check

from tgis.cli.ray import ENVIRONMENT
from tgis.observe.table import TABLE

GUIDE = (ROOT / "docs" / "deploy.md").read_text()
NOT_SETTINGS = {"UBI_VERSION", "KERNEL_TARGETS", "TORCH_INDEX", "UNAVAILABLE", "IMAGE", "EXTRAS"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table in a section."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_every_path_exists() -> None:
    paths = re.findall(r"(?<![\w./])(?:deployment|deploy|docs)/[\w./-]*\w", GUIDE)
    # kubectl's own way to name an object looks like a path.
    paths = [path for path in paths if not path.endswith(("-inference-server", "-predictor"))]
    assert len(set(paths)) > 8
    for path in paths:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((\w[\w./-]*)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link


def test_every_tree_that_is_applied_is_one() -> None:
    named = set(re.findall(r"(?:apply|delete) -k deployment/([\w/-]+)", GUIDE))
    assert named >= {"monitoring", "kserve", "storage/hub-cache", "storage/download"}
    assert named <= set(TREES)


def test_links_within_the_page() -> None:
    headings = re.findall(r"^## (.*)$", GUIDE, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) == anchors


def test_models_are_as_in_the_table() -> None:
    found = []
    for name in MODELS:
        manifests = tree(f"models/{name}")
        (container,) = the(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        model = environment(container, manifests).get("MODEL_NAME", "the one in the image")
        found.append([name, model, limits.get("nvidia.com/gpu", ""), limits["memory"]])
    assert sorted(rows("Models")) == sorted(found)


def test_components_are_as_in_the_table() -> None:
    named = [name for row in rows("Components") for name in re.findall(r"`([\w/-]+)`", row[0])]
    assert sorted(named) == COMPONENTS


def test_what_components_need_is_what_they_mount() -> None:
    for names, _, needs in rows("Components"):
        for name in re.findall(r"`([\w/-]+)`", names):
            text = (DEPLOYMENT / "components" / name / "kustomization.yaml").read_text()
            own = set(re.findall(r"(?:claimName|secretName): (\S+)", text))
            if "../tls" in text:
                own.add("tgis-tls")
            assert own == set(re.findall(r"`([\w-]+)`", needs)) - {"observability"}, name


def test_every_variable_is_a_setting() -> None:
    named = set(re.findall(r"\b[A-Z][A-Z0-9]+_[A-Z0-9_]+\b", GUIDE))
    assert named - NOT_SETTINGS - set(ENVIRONMENT) <= VARIABLES
    assert set(ENVIRONMENT) - named == {"RAY_USAGE_STATS_ENABLED"}
    assert {"DRAIN_TIMEOUT", "MODEL_NAME", "NUM_GPUS"} <= named


def test_every_metric_exists() -> None:
    assert set(re.findall(r"\btgi_\w+", GUIDE)) <= {spec.name for spec in TABLE}


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?:^|`)make ([\w -]+)", GUIDE, re.MULTILINE):
        for target in re.findall(r"[a-z][\w-]*", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_numbers_of_a_pod() -> None:
    pod = the(tree("base"), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    startup, ready, live = (
        container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")
    )
    assert startup["failureThreshold"] * startup["periodSeconds"] == 3600
    assert "an hour to load" in GUIDE
    seconds = ready["failureThreshold"] * ready["periodSeconds"]
    assert f"out of traffic {seconds} s after" in GUIDE
    assert live["failureThreshold"] * live["periodSeconds"] == 5 * 60
    assert "after\n  five minutes" in GUIDE
    assert f"`terminationGracePeriodSeconds` ({pod['terminationGracePeriodSeconds']})" in GUIDE
    assert f"pause ({container['lifecycle']['preStop']['exec']['command'][1]})" in GUIDE


def test_the_overlay_can_be_rendered(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    above = os.path.relpath(DEPLOYMENT, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(text.replace("../../tgis/deployment", above))
    manifests = render(tmp_path)
    deployment = the(manifests, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.org/tgis:1.0-cuda"
    container["image"] = "text-gen-server:0-cuda"
    assert {item["metadata"]["namespace"] for item in manifests} == {"models"}
    check(manifests, tmp_path / "file")
    scaler = the(manifests, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_commands_and_code_can_be_read() -> None:
    for text in blocks("sh"):
        subprocess.run(["sh", "-n"], input=text, text=True, check=True, timeout=60)
    for text in blocks("python"):
        ast.parse(text)
    assert yaml.safe_load(blocks("yaml")[0])["kind"] == "Kustomization"
