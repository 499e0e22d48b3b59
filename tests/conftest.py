"""What every room of the tests may use."""

import os
import signal
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Run in the background of a script, tests inherit an ignored SIGINT and would hand it on to the
# programs that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Models, tokenizers and recorded outputs that are not part of the repository."""
    path = Path(os.environ.get("TGIS_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no directory {path}; TGIS_SHARED names another one")
    return path


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The bundled demo model."""
    path = ROOT / "src" / "tgis" / "demo" / "model"
    if not (path / "config.json").exists():
        pytest.skip("the demo model has not been built yet")
    return path


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
