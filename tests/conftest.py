"""What every room of the tests may use."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import audit

ROOT = Path(__file__).resolve().parents[1]

# Run in the background of a script, tests inherit an ignored SIGINT and would hand it on to the
# programs that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# On for the whole suite, also in the servers that `tests.kit.server` starts.
WATCHED_ALREADY = audit.VARIABLE in os.environ  # by whoever has started this
os.environ.setdefault(audit.VARIABLE, tempfile.mkstemp(prefix="tgis-audit-")[1])
RECORD = Path(os.environ[audit.VARIABLE])
audit.install(RECORD)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail for what nobody may do, also if no test has."""
    if exitstatus == pytest.ExitCode.OK and audit.faults(RECORD):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    if not WATCHED_ALREADY:
        RECORD.unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what that was."""
    if faults := audit.faults(RECORD):
        terminalreporter.section("what nobody may do (tests/kit/audit.py)")
        for fault in faults:
            terminalreporter.write_line(fault)


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """A core switches gradients off for its whole process; tests that train want them back."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return ROOT / "src" / "tgis" / "demo" / "model"


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
