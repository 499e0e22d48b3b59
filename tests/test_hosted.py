"""A server of one's own: it serves, says why it cannot, and never outlives its owner."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kit.client import connect_blocking
from tests.kit.processes import alive, children, wait_until

from tgis.config import Config, parse
from tgis.errors import StartupError
from tgis.hosted import HostedServer, loopback

OWNER = """
import sys, time
from tgis.config import parse
from tgis.hosted import HostedServer, loopback
hosted = HostedServer(loopback(parse(["--threads=1"], {})))
hosted.wait()
print(hosted.process.pid, flush=True)
time.sleep(600)
"""


def settings(*words: str) -> Config:
    return loopback(parse(["--threads=1", *words], {}))


def test_serves_until_it_is_stopped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        hosted = HostedServer(settings(), log)
    try:
        serving = hosted.wait()
        assert hosted.ended == ""
        processes = children(hosted.process.pid).values()
        with connect_blocking(f"127.0.0.1:{serving.grpc_port}") as client:
            answer = client.call("Generate", {"requests": [{"text": "Once"}]})
            assert isinstance(answer, dict)
    finally:
        hosted.stop()
    assert hosted.ended == "exit code 0"
    assert not any(map(alive, processes))
    assert "ready: demo" in (tmp_path / "log").read_text()


def test_says_why_it_cannot_serve() -> None:
    hosted = HostedServer(settings("--model-name=/no/model"))
    with pytest.raises(StartupError, match="/no/model not found") as caught:
        hosted.wait()
    assert caught.value.exit_code == 1
    hosted.stop()


def test_a_server_that_is_killed_while_it_starts() -> None:
    hosted = HostedServer(settings())
    hosted.process.kill()
    with pytest.raises(StartupError, match="ended before it was ready"):
        hosted.wait()
    hosted.stop()
    assert hosted.ended == "SIGKILL"


def test_ends_with_its_owner() -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        processes = [pid, *children(pid).values()]
        assert all(map(alive, processes))
        os.kill(owner.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, processes)))
