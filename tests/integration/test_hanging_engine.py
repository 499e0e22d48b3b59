"""A real server whose engine, of another package, hangs in a C call when it is told to."""

import json
import os
from pathlib import Path

import pytest
from tests.kit.client import Status, connect_blocking
from tests.kit.processes import alive, children, wait_until
from tests.kit.server import Server, run_server

# The native engine, but for the first long prompt after the file TOLD was made.
PACKAGE = """
import ctypes, os, time
from tgis.engines import registry

def load(config, files, dtype, progress):
    engine = registry.load_native(config, files, dtype, progress)
    forward = engine.forward

    def hang(plan):
        if plan.num_tokens >= 64 and os.path.exists(os.environ["TOLD"]):
            os.remove(os.environ["TOLD"])
            WAYS[os.environ["WAY"]]()
        return forward(plan)

    engine.forward = hang
    return engine

def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

WAYS = {
    "pause": ctypes.CDLL(None).pause,
    "spin": lambda: compute(600),
    "compute": lambda: compute(6),
}
"""
LONG_PROMPT = "Once upon a time there was a little dog who liked to play in the park. " * 8


def hanging_engine(directory: Path, way: str) -> dict[str, str]:
    """Install the package; the environment in which a server finds it."""
    info = directory / "site" / "hanging_engine-1.0.dist-info"
    info.mkdir(parents=True)
    (directory / "site" / "hanging_engine.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tgis.engines]\nhanging = hanging_engine:load\n")
    path = [str(directory / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "TOLD": str(directory / "told"), "WAY": way}


def generate(server: Server, text: str) -> object:
    with connect_blocking(server.grpc) as client:
        request = {"requests": [{"text": text}], "params": {"stopping": {"maxNewTokens": 4}}}
        return client.call("Generate", request)


@pytest.mark.parametrize(
    ("way", "flags", "said"),
    [
        ("pause", ["--hang-timeout", "2"], "nothing is being computed or read"),
        ("spin", ["--max-step-seconds", "8"], "longer than --max-step-seconds allows"),
    ],
)
def test_an_engine_that_hangs_is_noticed_and_replaced(
    demo_model_dir: Path, tmp_path: Path, way: str, flags: list[str], said: str
) -> None:
    env = hanging_engine(tmp_path, way)
    with run_server(demo_model_dir, "--engine", "hanging", *flags, env=env) as server:
        core = children(server.process.pid)["tgis.core"]
        Path(env["TOLD"]).touch()
        answer = generate(server, LONG_PROMPT)
        assert isinstance(answer, Status)
        assert answer.code == "UNAVAILABLE"
        wait_until(lambda: not alive(core))
        assert said in server.log()
        assert "hanging_engine.py" in server.log()  # where it hangs
        wait_until(lambda: isinstance(generate(server, LONG_PROMPT), dict))


def test_a_long_step_is_left_alone(demo_model_dir: Path, tmp_path: Path) -> None:
    env = hanging_engine(tmp_path, "compute")
    flags = ["--engine", "hanging", "--hang-timeout", "2", "--log-format", "json"]
    with run_server(demo_model_dir, *flags, env=env) as server:
        Path(env["TOLD"]).touch()
        assert isinstance(generate(server, LONG_PROMPT), dict)
        assert not Path(env["TOLD"]).exists()
        assert all(json.loads(line) for line in server.log().splitlines())
