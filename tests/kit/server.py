"""A real server process for tests: started on free ports, awaited, watched, ended, judged."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kit import audit

READY_SECONDS = 60.0
STOP_SECONDS = 8.0  # what the reference's own suite allows an idle server
PROBE_SECONDS = 10.0
PROBE_PAUSE = 0.1

# What a server may see of the tester's environment: nothing that could configure it.
PASSED_ON = (
    "PATH",
    "PYTHONPATH",  # another checkout of this project
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "OMP_NUM_THREADS",
    "LD_LIBRARY_PATH",
    "TGIS_SHARED",
    audit.VARIABLE,
)


@dataclass
class Server:
    """A running server.

    Attributes:
        grpc: address of the gRPC port.
        http: base URL of health and metrics.
        log_path: stdout and stderr of all its processes.
    """

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    log_path: Path

    def log(self) -> str:
        """What it has written so far."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str, timeout: float = PROBE_SECONDS) -> tuple[int, str]:
        """GET a path of the HTTP port: status and body."""
        try:
            with urllib.request.urlopen(self.http + path, timeout=timeout) as response:
                return int(response.status), response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Wait until /health answers 200.

        Raises:
            RuntimeError: the process ended, or the time is over; the log's end is in the text.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                status, _ = self.get("/health")
                if status == 200:
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass  # not listening yet
            # Waiting for the process is the pause, and notices its end at once.
            try:
                code = self.process.wait(PROBE_PAUSE)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"the server ended with {code} before it was ready\n{self.tail()}")
        raise RuntimeError(f"the server was not ready within {timeout} s\n{self.tail()}")

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """SIGTERM, then the exit code.

        Raises:
            RuntimeError: it did not end in time; it and its children have been killed.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            text = f"the server did not end within {timeout} s of SIGTERM"
            raise RuntimeError(f"{text}\n{self.tail()}") from None

    def kill(self) -> None:
        """SIGKILL for the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self, num_lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log().splitlines()[-num_lines:])


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that are free now; all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def scrubbed_environment(home: Path) -> dict[str, str]:
    """An environment that configures nothing."""
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if audit.VARIABLE in env:
        paths = [str(audit.SITE), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
    return env | {"HOME": str(home), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def start_server(
    model: Path | str,
    directory: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    grpc_port: int | None = None,
    http_port: int | None = None,
    dtype: str = "float32",
) -> Server:
    """Start `tgis serve` for a model; returns at once.

    Args:
        directory: where the log goes; also its HOME.
        grpc_port: None for any free one, as `http_port`.
    """
    free = free_ports(2)
    grpc_port, http_port = grpc_port or free[0], http_port or free[1]
    command = [sys.executable, "-m", "tgis.cli.main", "serve", str(model), "--dtype", dtype]
    command += ["--grpc-port", str(grpc_port), "--port", str(http_port), *flags]
    log_path = directory / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=scrubbed_environment(directory) | (env or {}),
            cwd=directory,
            start_new_session=True,
        )
    return Server(process, f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", log_path)


@contextmanager
def run_server(
    model: Path | str,
    *flags: str,
    env: dict[str, str] | None = None,
    ready_seconds: float = READY_SECONDS,
) -> Iterator[Server]:
    """A ready server for the length of a block; SIGTERM must then end it with exit code 0.

    Args:
        model: a directory or name, as for `tgis serve`.
        flags: further command line flags.
        env: variables on top of an environment that configures nothing.
        ready_seconds: that it may take to become ready.
    """
    with tempfile.TemporaryDirectory(prefix="tgis-test-") as name:
        server = start_server(model, Path(name), *flags, env=env)
        try:
            server.wait_ready(ready_seconds)
            yield server
            if server.process.poll() is not None:
                code = server.process.returncode
                raise RuntimeError(f"the server ended by itself with {code}\n{server.tail()}")
            code = server.stop()
            assert code == 0, f"exit code {code} after SIGTERM\n{server.tail()}"
        finally:
            if server.process.poll() is None:
                server.kill()
