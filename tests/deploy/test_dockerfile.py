"""The Dockerfile: linted, and what it promises about its last stage."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.deploy.dockerfile import (
    DEVICES,
    ROOT,
    arguments,
    command,
    environment,
    lineage,
    stages,
)
from tests.deploy.manifests import VARIABLES

from tgis import __version__
from tgis.config import LAUNCHER, parse
from tgis.models.kernels.build import TARGETS

RELEASE = "server-release"
PACKAGES = {"python3.11", "gcc-toolset-14-gcc"}
OF_OTHERS = {"PATH", "HOME", "LANG", "PYTHONDONTWRITEBYTECODE"}
OF_OTHERS |= {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
LABELS = ("title", "description", "version", "revision", "licenses")


def test_linter() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint to lint with")
    line = [hadolint, "--no-color", "--config", "deploy/hadolint.yaml", "Dockerfile"]
    result = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("device", DEVICES)
def test_the_base_is_ubi_minimal_of_a_fixed_release(device: str) -> None:
    known = stages(device)
    (base,) = {stage.parent for stage in known.values()} - set(known)
    assert base == "registry.access.redhat.com/ubi9/ubi-minimal:${UBI_VERSION}"
    assert re.fullmatch(r"9\.\d+", arguments()["UBI_VERSION"])


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_has_neither_compiler_nor_pip(device: str) -> None:
    line = lineage(RELEASE, device)
    assert not {"tools", "server"} & {stage.name for stage in line}
    steps = "\n".join(text for stage in line for text in stage.of("RUN"))
    installed = re.findall(r"microdnf install (.*?)&&", steps, re.DOTALL)
    packages = {word for part in installed for word in part.split() if not word.startswith("-")}
    assert packages == {"python3.11"}
    assert "pip install" not in steps
    # The build itself fails where one is left.
    assert "for tool in gcc cc c++ clang pip pip3" in steps
    assert "import pip" in steps
    (removal,) = stages(device)["server-without-pip"].of("RUN")
    assert removal == "python -m pip uninstall --yes pip"


@pytest.mark.parametrize("device", DEVICES)
def test_any_user_may_run_it_and_write_only_at_home(device: str) -> None:
    release = stages(device)[RELEASE]
    assert release.of("USER") == ["2000:0"], "a number, so that runAsNonRoot can be checked"
    env = environment(RELEASE, device)
    assert env["HOME"] == "/home/tgis"
    assert release.of("WORKDIR") == [env["HOME"]]
    (setup, _) = release.of("RUN")
    assert f"install --directory --owner=2000 --group=0 --mode=0770 {env['HOME']}" in setup
    assert release.of("COPY") == ["--from=server-without-pip --chown=0:0 /opt/tgis /opt/tgis"]
    assert "chmod" not in setup


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_starts(device: str) -> None:
    release = stages(device)[RELEASE]
    (entry,) = release.of("ENTRYPOINT")
    assert command(entry) == ["text-generation-launcher"]
    env = environment(RELEASE, device)
    assert set(env) <= VARIABLES | OF_OTHERS
    config = parse([], env, LAUNCHER)
    assert release.of("EXPOSE") == [f"{config.port} {config.grpc_port}"]
    assert config.host == "0.0.0.0"
    assert config.num_shard == 1, "a node's driver says how many devices there are"
    (check,) = release.of("HEALTHCHECK")
    assert "http://127.0.0.1:${PORT}/health" in command(check)[-1]
    limits = dict(re.findall(r"--([\w-]+)=(\w+)", check.partition("CMD")[0]))
    assert limits["timeout"] == "3s"
    services = f"{config.grpc_port}:grpc,{config.port}:http"
    (labels,) = release.of("LABEL")
    assert f'io.openshift.expose-services="{services}"' in labels
    assert all(f"org.opencontainers.image.{name}=" in labels for name in LABELS)
    assert arguments()["VERSION"] == __version__


def test_nothing_of_the_downloads_stays() -> None:
    for device in DEVICES:
        for stage in stages(device).values():
            assert not stage.of("ADD")
            for step in stage.of("RUN"):
                assert step.count("pip install") == step.count("pip install --no-cache-dir")
                assert ("microdnf install" in step) == ("microdnf clean all" in step)
                for part in re.findall(r"microdnf install (.*?)&&", step, re.DOTALL):
                    assert "--nodocs --setopt=install_weak_deps=0" in part
                    assert {word for word in part.split() if word[0] != "-"} <= PACKAGES


def test_kernels_are_compiled_for_every_machine() -> None:
    assert arguments()["KERNEL_TARGETS"].split() == [target.name for target in TARGETS]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for stage in stages("cpu").values():
        for step in stage.of("COPY"):
            words = step.split()
            if any(word.startswith("--from") for word in words):
                continue
            for word in words[:-1]:
                paths = [ROOT] if word == "." else ROOT.glob(word)
                found = [str(path.relative_to(ROOT)) for path in paths]
                assert found, word
                for source in found:
                    assert not any(fnmatch.fnmatch(source, pattern) for pattern in patterns), source


def test_the_locked_packages_are_those_of_the_project() -> None:
    command = [sys.executable, ROOT / "deploy" / "lock_requirements.py", "--check"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_extras_come_from_locked_lists(tmp_path: Path) -> None:
    assert arguments()["EXTRAS"] == ""
    (step,) = (text for text in stages("cpu")["server"].of("RUN") if "EXTRAS" in text)
    pip = tmp_path / "python"
    pip.write_text('#!/bin/sh\necho "$@"\ntest -f "$8"\n')
    pip.chmod(0o755)

    def run(extras: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EXTRAS": extras}
        words = ["sh", "-ec", step]
        return subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT, env=env)

    assert run("").stdout == ""
    start = "-m pip install --no-cache-dir --constraint deploy/requirements.txt --requirement"
    extras = sorted(path.stem.partition("-")[2] for path in ROOT.glob("deploy/requirements-*.txt"))
    assert extras == ["bitsandbytes", "fms", "ort", "ray"]
    found = run(" ".join(extras))
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        f"{start} deploy/requirements-{extra}.txt" for extra in extras
    ]
    assert run("nothing ort").returncode != 0


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_make_builds_what_tgis_builds(engine: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    for target, stage, image in (
        ("build", RELEASE, "text-gen-server:0"),
        ("build-cuda", RELEASE, "text-gen-server:0-cuda"),
        ("build-test-image", "cpu-tests", "cpu-tests:0"),
        ("integration-tests", "cpu-tests", "cpu-tests:0"),
    ):
        line = ["make", "--dry-run", target, f"CONTAINER={engine}"]
        # The tests may themselves be run by make, whose flags must not reach this one.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        result = subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT, env=env)
        build = result.stdout.splitlines()[0].split()
        assert build[:4] == [engine, "build", "--target", stage]
        assert build[-3:] == ["--tag", image, "."]
        names = {word.partition("=")[0] for word in build if "=" in word}
        assert names <= set(arguments())
    assert stages("cpu")["cpu-tests"].of("USER") == ["2000:0"]
