"""The contract's greedy cases through a server on the card."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contract.cases import DEMO, Json, flags
from tests.contract.test_contract import FILES, Served, run_all_at_once
from tests.kit.server import run_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def is_greedy(case: Json) -> bool:
    return case["request"].get("params", {}).get("method", "GREEDY") == "GREEDY"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = FILES["demo"]
    content = file.content | {"cases": [case for case in file.cases if is_greedy(case)]}
    with run_server(DEMO, *flags(file.limits), "--device", "cuda") as server:
        yield Served(replace(file, content=content), server)


async def test_all_at_once_and_shuffled(served: Served, tmp_path: Path) -> None:
    assert "attention over blocks by" in served.server.log()
    await run_all_at_once(served)
