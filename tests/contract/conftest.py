"""One server on the demo model for all tests that need no particular settings."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.oracle import Limits, Oracle
from tests.kit.client import Client, connect_blocking
from tests.kit.server import Server, run_server

LIMITS = Limits()  # max_concurrent_requests is the server's default as well
BATCH_SIZE = 8
FLAGS = ["--max-batch-size", str(BATCH_SIZE), "--threads", "1"]
FLAGS += ["--max-sequence-length", str(LIMITS.max_sequence_length)]
FLAGS += ["--max-new-tokens", str(LIMITS.max_new_tokens)]


@pytest.fixture(scope="session")
def demo_server(demo_model_dir: Path) -> Iterator[Server]:
    """A server that runs the demo model in float32 with the limits of the case files."""
    with run_server(demo_model_dir, *FLAGS) as server:
        yield server


@pytest.fixture
def demo_client(demo_server: Server) -> Iterator[Client]:
    """A blocking client of it."""
    with connect_blocking(demo_server.grpc) as client:
        yield client


@pytest.fixture(scope="session")
def demo_oracle(demo_model_dir: Path) -> Oracle:
    """The oracle for the same model and limits."""
    return Oracle(demo_model_dir, LIMITS)
