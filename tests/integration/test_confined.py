"""A server with nothing but a read-only file system, a writable /tmp, and no network.

It runs in namespaces of its own, as a user that no file knows (where the tester is root).
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UID = 12345

SETUP = """
set -e
ip link set lo up
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir /tmp/keep
mount --bind "$PREFIX" /tmp/keep
if [ -n "$HIDDEN" ]; then
    mount -t tmpfs -o mode=755 tmpfs "$HIDDEN"
    mkdir -p "$PREFIX"
    mount --bind /tmp/keep "$PREFIX"
fi
mount -o remount,bind,ro /
cd "$REPOSITORY"
exec "$@"
"""

# Runs inside, and is all of the test that can: the loopback interface is one of its own.
INSIDE = """
import os, socket, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from tests.kit.client import connect_blocking
from tests.kit.server import run_server

try:
    Path("/written").touch()
except OSError:
    pass
else:
    raise SystemExit("the file system can be written")
try:
    socket.create_connection(("192.0.2.1", 80), 1)
except OSError:
    pass
else:
    raise SystemExit("there is a network")
with run_server(sys.argv[1], env={"HOME": "/"}) as server, connect_blocking(server.grpc) as client:
    answer = client.call("Generate", {"requests": [{"text": "Once upon a time"}]})
    assert isinstance(answer, dict), answer
    assert server.get("/health?deep=1") == (200, "")
    log = server.log()
print(log)
print("uid", os.getuid(), "was served")
"""


def hidden_ancestor(path: Path) -> str:
    """The first directory above `path` that others may not enter, or ""."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return str(folder)
    return ""


def confinement() -> tuple[list[str], list[str]]:
    """The commands that enter the namespaces and that give up the user; or skip."""
    for tool in ("unshare", "ip", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} command to confine a server with")
    is_root = os.getuid() == 0 and shutil.which("setpriv") is not None
    enter = ["unshare", *([] if is_root else ["--map-root-user"]), "--mount", "--net"]
    probe = [*enter, "sh", "-c", "ip link set lo up && mount -t tmpfs tmpfs /tmp"]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("namespaces may not be made here")
    drop = ["setpriv", f"--reuid={UID}", "--regid=0", "--clear-groups"] if is_root else []
    return enter, drop


def test_any_user_read_only_root_no_network(demo_model_dir: Path) -> None:
    enter, drop = confinement()
    if str(ROOT).startswith("/tmp/"):
        pytest.skip("the repository lies in /tmp, which is to be empty")
    python = [sys.executable, "-B", "-c", INSIDE, str(demo_model_dir)]
    prefix = Path(sys.base_prefix)
    env = os.environ | {
        "PREFIX": str(prefix),
        "HIDDEN": hidden_ancestor(prefix) if drop else "",
        "REPOSITORY": str(ROOT),
        "HOME": "/",
        "TMPDIR": "/tmp",
    }
    result = subprocess.run(
        [*enter, "sh", "-c", SETUP, "sh", *drop, *python],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("was served\n")
    if drop:
        assert f"uid {UID} was served" in result.stdout
    assert "Traceback" not in result.stdout
