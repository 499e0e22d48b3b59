"""One server on the demo model for all tests that need no particular settings."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.cases import flags
from tests.contract.oracle import Limits, Oracle
from tests.kit.client import Client, connect_blocking
from tests.kit.server import Server, run_server

LIMITS = Limits()


@pytest.fixture(scope="session")
def demo_server(demo_model_dir: Path) -> Iterator[Server]:
    """A server that runs the demo model in float32 with the limits of the case files."""
    with run_server(demo_model_dir, *flags(LIMITS)) as server:
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
