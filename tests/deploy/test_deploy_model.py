"""deploy_model.sh: what it prints, what it applies, what it refuses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.deploy.manifests import DEPLOYMENT, MODELS, render, renderer, the, tree

SCRIPT = DEPLOYMENT / "deploy_model.sh"


def run(
    *words: str, path: str | None = None, cwd: Path = DEPLOYMENT
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": path if path is not None else os.environ["PATH"], "HOME": "/nowhere"}
    return subprocess.run(
        [shutil.which("sh") or "sh", SCRIPT, *words],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        timeout=60,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for part in parts:
        assert part in line, line


def test_dry_run_prints_what_kustomize_makes(tmp_path: Path) -> None:
    renderer()
    result = run("demo", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(yaml.safe_load_all(result.stdout)) == tree("models/demo")


def test_another_image() -> None:
    renderer()
    image = "registry.example.org/team/tgis:1.2-cuda"
    result = run("llama-2-7b", "--dry-run", "--image", image)
    manifests = list(yaml.safe_load_all(result.stdout))
    pod = the(manifests, "Deployment")["spec"]["template"]["spec"]
    assert [container["image"] for container in pod["containers"]] == [image]
    pod["containers"][0]["image"] = "text-gen-server:0-cuda"
    assert manifests == tree("models/llama-2-7b")


def test_an_overlay_of_ones_own() -> None:
    renderer()
    path = DEPLOYMENT / "examples" / "production"
    result = run(str(path), "--dry-run")
    assert list(yaml.safe_load_all(result.stdout)) == render(path)


def test_apply_hands_the_manifests_to_kubectl(tmp_path: Path) -> None:
    """Where the cluster would be, a kubectl that renders and writes down what it is to apply."""
    render_command = " ".join(renderer())
    real = shutil.which(render_command.split()[0])
    fake = tmp_path / "kubectl"
    fake.write_text(
        f'#!/bin/sh\ncase $1 in kustomize) exec {real} {render_command.split()[1]} "$2" ;; esac\n'
        f'echo "$@" > {tmp_path}/words\ncat > {tmp_path}/applied\n'
    )
    fake.chmod(0o755)
    result = run("demo", "-n", "models", path=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "words").read_text().split()
    assert words == ["apply", "--namespace", "models", "--filename", "-"]
    applied = list(yaml.safe_load_all((tmp_path / "applied").read_text()))
    assert applied == tree("models/demo")


@pytest.mark.parametrize("words", [("no-such-model",), (), ("../models",), ("demo/..",)])
def test_an_unknown_overlay_lists_the_known_ones(words: tuple[str, ...]) -> None:
    assert_refused(run(*words), *words, "known: ", *MODELS)


def test_help_lists_the_models() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "models: " + " ".join(MODELS)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("demo", "--dryrun"), "--dryrun: unknown option"),
        (("demo", "--image"), "--image: has no value"),
        (("demo", "--image", ""), "--image: has no value"),
        (("demo", "--image", "a b|e id"), "'a b|e id' is no name of an image"),
        (("demo", "bloom"), "demo is given already"),
    ],
)
def test_bad_words(words: tuple[str, ...], part: str) -> None:
    assert_refused(run(*words), part)


def test_without_tools(tmp_path: Path) -> None:
    for tool in ("sh", "dirname", "basename"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    assert_refused(run("demo", "--dry-run", path=str(tmp_path)), "neither kustomize nor kubectl")
