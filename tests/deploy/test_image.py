"""The image without a container engine: the Dockerfile's own steps, run in a clean root.

The packages are those of the tester's environment, linked rather than fetched. The result is served
from a root that has the C library, a Python and /opt/tgis, read-only, to a user that no file knows.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from tests.deploy.dockerfile import ROOT, command, environment, lineage, stages
from tests.kit.client import connect_blocking
from tests.kit.processes import children
from tests.kit.server import Server, free_ports

LAST = "server-without-pip"
PYTHON = "python3.11"
UID = 12345
SOURCE = "usr/src/tgis"
SITE_PACKAGES = f"opt/tgis/lib/{PYTHON}/site-packages"
BASE = Path(sys.base_prefix)
REQUEST = {
    "requests": [{"text": "Once upon a time"}],
    "params": {"method": "SAMPLE", "sampling": {"seed": 7}},
}
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64")

BUILD_ARGUMENTS = {"EXTRAS": "ort fms"}  # which a developer's environment has
LOCKS = ("requirements", "requirements-ort", "requirements-fms")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# In namespaces of its own: the root is shown read-only, with what an image would have around it.
CONFINE = """
set -e
mount --bind "$ROOT" "$ROOT"
mount -o remount,bind,ro "$ROOT"
for path in $MOUNTS; do
    mount --bind "$path" "$ROOT$path"
    mount -o remount,bind,ro "$ROOT$path"
done
mount --rbind /dev "$ROOT/dev"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
mount -t tmpfs -o mode=0770,uid=2000,gid=0 tmpfs "$ROOT$IMAGE_HOME"
exec env -i $ENVIRONMENT "$CHROOT" --userspec=$USERSPEC --groups=0 "$ROOT" "$@"
"""

LOOK_AROUND = """
import importlib.util, os, pathlib, shutil
assert importlib.util.find_spec("pip") is None
assert importlib.util.find_spec("onnxruntime")
assert importlib.util.find_spec("fms")
assert not any(map(shutil.which, ("gcc", "cc", "c++", "clang", "ld", "pip", "pip3")))
for place in ("/", "/opt/tgis", "/opt/tgis/bin", "/home", "/usr"):
    assert not os.access(place, os.W_OK), place
for place in ("/tmp", "/home/tgis"):
    pathlib.Path(place, "written").touch()
print("uid", os.getuid(), "gid", os.getgid())
"""


def link(source: str, target: str) -> None:
    """A file a second time, without its bytes where the file system allows that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def link_package(name: str, site_packages: Path) -> None:
    """An installed package in another environment."""
    package = distribution(name)
    for file in package.files or ():
        source = Path(str(package.locate_file(file)))
        if ".." in file.parts or not source.is_file():
            continue  # scripts, which nobody calls
        target = site_packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        link(str(source), str(target))


def provide_packages(root: Path, lock: Path) -> None:
    """What the next steps would fetch by a list, in the versions that are here."""
    lines = lock.read_text().splitlines()
    names = [line.split("==")[0] for line in lines if not line.startswith("#")]
    versions = {name: distribution(name).version for name in names}
    lock.write_text("".join(f"{name}=={versions[name]}\n" for name in names))
    site_packages = root / SITE_PACKAGES
    if "setuptools" in names:
        for old in site_packages.glob("setuptools*"):
            shutil.rmtree(old)
    for name in names:
        link_package(name, site_packages)


def copy(root: Path, text: str) -> None:
    *words, target = text.split()
    for source in (path for word in words for path in ROOT.glob(word)):
        place = root / SOURCE / target
        place = place / source.name if target.endswith("/") else place
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(source, place, ignore=ignored)
        else:
            shutil.copy2(source, place)
        if source.stem in LOCKS:
            provide_packages(root, place)


def run_step(root: Path, text: str, values: dict[str, str]) -> None:
    """One RUN, with /opt being the root's."""
    env = values | {
        "PATH": f"/opt/tgis/bin:{BASE}/bin:/usr/bin:/bin",
        "HOME": str(root / "tmp"),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    script = f"mount --bind {root}/opt /opt && cd {root}/{SOURCE} && {text}"
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    assert result.returncode == 0, f"{text}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"


def build(root: Path) -> list[str]:
    """Everything up to the stage that the image is copied from; returns the steps run."""
    for folder in ("opt", SOURCE, "tmp", "dev", "proc", "etc", "home/tgis", *map(inside, mounts())):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "lib").symlink_to("usr/lib")
    actions: dict[str, Callable[[str], None]] = {
        "COPY": lambda text: copy(root, text),
        "RUN": lambda text: run_step(root, text, values),
    }
    values: dict[str, str] = {}
    done = []
    for stage in lineage(LAST, "cpu"):
        for name, text in stage.steps:
            if name == "ARG":
                key, _, value = text.partition("=")
                values[key] = BUILD_ARGUMENTS.get(key, value.strip('"'))
            elif name in actions and "microdnf" not in text:
                actions[name](text)
                done.append(text)
    return done


def inside(path: Path) -> str:
    return str(path).lstrip("/")


def mounts() -> list[Path]:
    """What the base image brings: a C library and a Python."""
    return [BASE, *(Path(path) for path in LIBRARIES if Path(path).is_dir())]


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """The root file system."""
    if os.getuid() != 0:
        pytest.skip("only root may mount and change the user")
    for tool in ("unshare", "mount", "chroot", "curl"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} command")
    if not (BASE / "bin" / PYTHON).exists():
        pytest.skip(f"the image has {PYTHON}, and this is another one")
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    if subprocess.run(probe, check=False).returncode:
        pytest.skip("namespaces may not be made here")
    with tempfile.TemporaryDirectory(prefix="tgis-image-") as name:
        root = Path(name)
        root.chmod(0o755)
        steps = build(root)
        assert [text for text in steps if "tgis.models.kernels.build" in text]
        yield root


def confined(root: Path, env: dict[str, str], *words: str) -> tuple[list[str], dict[str, str]]:
    """A command in the image, and the environment of the shell that starts it."""
    image_env = environment("server-release", "cpu")
    path = image_env.pop("PATH").partition(":")[0]
    image_env = {"PATH": path} | image_env | env
    outer = {
        "PATH": os.environ["PATH"],
        "ROOT": str(root),
        "CHROOT": shutil.which("chroot") or "",
        "MOUNTS": " ".join(map(str, mounts())),
        "IMAGE_HOME": image_env["HOME"],
        "ENVIRONMENT": " ".join(f"{key}={value}" for key, value in image_env.items()),
        "USERSPEC": f"{UID}:0",
    }
    return ["unshare", "--mount", "sh", "-c", CONFINE, "sh", *words], outer


def test_what_is_there(image: Path) -> None:
    words, env = confined(image, {}, "/opt/tgis/bin/python", "-c", LOOK_AROUND)
    result = subprocess.run(
        words, check=False, capture_output=True, text=True, env=env, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"uid {UID} gid 0\n"


def test_one_request_is_served(image: Path, tmp_path: Path) -> None:
    grpc_port, port = free_ports(2)
    settings = {
        "MODEL_NAME": f"/{SITE_PACKAGES}/tgis/demo/model",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "GRPC_PORT": str(grpc_port),
    }
    (entry,) = stages("cpu")["server-release"].of("ENTRYPOINT")
    (program,) = command(entry)
    words, env = confined(image, settings, f"/opt/tgis/bin/{program}")
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    server = Server(process, f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{port}", log_path)
    try:
        server.wait_ready(120)
        with connect_blocking(server.grpc) as client:
            answer = client.call("Generate", REQUEST)
        assert isinstance(answer, dict), answer
        assert answer["responses"][0]["generatedTokenCount"] == 20
        core = children(process.pid)["tgis.core"]
        maps = Path(f"/proc/{core}/maps").read_text()
        for prebuilt in ("models/kernels/lib/tgis_kernels_", "sampling/tgis_noise_"):
            found = f"/{SITE_PACKAGES}/tgis/{prebuilt}" in maps
            assert found, f"{prebuilt} is not loaded\n{server.tail()}"
        status = Path(f"/proc/{core}/status").read_text()
        assert f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n" in status
        (check,) = stages("cpu")["server-release"].of("HEALTHCHECK")
        healthy = subprocess.run(command(check), check=False, env=settings | {"PATH": "/usr/bin"})
        assert healthy.returncode == 0, shlex.join(command(check))
        assert server.stop(30) == 0
    finally:
        if process.poll() is None:
            server.kill()
    assert "Traceback" not in server.log()
    unhealthy = subprocess.run(command(check), check=False, env=settings | {"PATH": "/usr/bin"})
    assert unhealthy.returncode != 0
