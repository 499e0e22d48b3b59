"""Real servers with keys and values in blocks: the answers of rows, and shared prefixes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.integration.test_sharded import PARAMS, PROMPTS, STORY, ask, close_to, collected
from tests.kit.client import Json, Status
from tests.kit.server import Server, run_server

FLAGS = ("--dtype-str", "float32", "--threads", "1")


@pytest.fixture(scope="module")
def servers(demo_model_dir: Path) -> Iterator[list[Server]]:
    """One with rows, one with blocks."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(run_server(demo_model_dir, *FLAGS, "--kv-layout", layout))
            for layout in ("rows", "blocks")
        ]


@pytest.mark.parametrize("name", PARAMS)
def test_answers_are_the_same(servers: list[Server], name: str) -> None:
    request = {"requests": [{"text": text} for text in PROMPTS], "params": PARAMS[name]}
    rows, blocks = (ask(server, lambda c: c.call("Generate", request)) for server in servers)
    assert not isinstance(rows, Status)
    assert close_to(rows, blocks), (rows, blocks)


def test_streams_are_the_same(servers: list[Server]) -> None:
    request = {"request": {"text": PROMPTS[0]}, "params": PARAMS["details"]}
    rows, blocks = (collected(ask(server, lambda c: c.stream(request))) for server in servers)
    assert close_to(rows, blocks)


def hit_tokens(server: Server) -> float:
    _, body = server.get("/metrics")
    lines = (line.split() for line in body.splitlines())
    return next(float(line[1]) for line in lines if line[:1] == ["tgi_prefix_cache_hit_tokens"])


def test_a_second_request_shares_the_first_ones_blocks(servers: list[Server]) -> None:
    blocks = servers[1]
    assert "attention over blocks by reference" in blocks.log()
    before = hit_tokens(blocks)
    request: Json = {"requests": [{"text": STORY * 2}], "params": PARAMS["greedy"]}
    first, second = (ask(blocks, lambda c: c.call("Generate", request)) for _ in range(2))
    assert first == second
    hit = hit_tokens(blocks) - before
    assert hit >= 32
    assert hit % 16 == 0
