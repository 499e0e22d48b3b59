"""`tgis serve --ray` on a small Ray cluster of its own, that must end without leaving anything."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.kit.processes import alive, wait_until
from tests.kit.server import Server, free_ports, scrubbed_environment

START_SECONDS = 300.0
STOP_SECONDS = 120.0
REPLICA = "ray::ServeReplica"
WORKER = "ray::MapWorker"


def require_ray() -> None:
    """Skip where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no Ray: pip install 'tgis[ray]'")


def ray_environment(directory: Path) -> dict[str, str]:
    """For a command that starts a cluster, with its files apart."""
    return scrubbed_environment(directory) | {
        "RAY_TMPDIR": str(directory),
    }


def descendants(pid: int) -> dict[int, str]:
    """Every process below one, with its command line."""
    found: dict[int, str] = {}
    try:
        # Every thread has children of its own.
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        below = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return found
    for child in below:
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found[child] = " ".join(word.decode(errors="replace") for word in words).strip()
        found |= descendants(child)
    return found


def named(pid: int, name: str) -> set[int]:
    """Processes below one whose command line begins with, or contains as a word, a name."""
    return {
        child
        for child, line in descendants(pid).items()
        if line.startswith(name) or f" {name} " in f" {line} "
    }


@contextmanager
def ray_directory() -> Iterator[Path]:
    """A directory with a short name: the paths of Ray's sockets are long."""
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def run_on_ray(
    model: Path,
    *flags: str,
    dtype: str = "float32",
    http_port: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Replicas behind Serve's proxies for the length of a block; nothing is left afterwards.

    Args:
        http_port: None for any free one.
        env: variables that Ray reads.
    """
    require_ray()
    grpc_port, free_port = free_ports(2)
    http_port = http_port or free_port
    with ray_directory() as directory:
        command = [sys.executable, "-m", "tgis.cli.main", "serve", str(model), "--dtype", dtype]
        command += ["--host", "127.0.0.1", "--grpc-port", str(grpc_port), "--port", str(http_port)]
        log_path = directory / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*command, "--ray", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ray_environment(directory) | dict(env or {}),
                cwd=directory,
                start_new_session=True,
            )
        http = f"http://127.0.0.1:{http_port}"
        server = Server(process, f"127.0.0.1:{grpc_port}", http, log_path)
        try:
            wait_until(
                lambda: "ready on gRPC" in server.log() or process.poll() is not None,
                START_SECONDS,
            )
            assert process.poll() is None, server.tail()
            yield server
            others = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 0, server.tail()
            wait_until(lambda: not any(map(alive, others)), STOP_SECONDS)
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                if process.poll() is None or alive(pid):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
