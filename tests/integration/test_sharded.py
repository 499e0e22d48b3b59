"""Real servers with a model in parts: the same answers, and what happens when a part is lost."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.kit.client import Json, Status, connect_blocking
from tests.kit.processes import alive, children, wait_until
from tests.kit.ranks import listening
from tests.kit.server import Server, free_ports, run_server, start_server

TOLERANCE = 1e-4
NUMBERS = {"logprob"}
ALL_DETAILS = {
    "inputText": True,
    "generatedTokens": True,
    "inputTokens": True,
    "tokenLogprobs": True,
    "tokenRanks": True,
    "topNTokens": 3,
}
PROMPTS = ["Once upon a time", "The dog", "Lily and Tom went to the", "One day, a little cat"]
STORY = "Once upon a time there was a little dog who liked to play in the park with his friends. "

PARAMS: dict[str, Json] = {
    "greedy": {"stopping": {"maxNewTokens": 24}},
    "details": {"stopping": {"maxNewTokens": 8}, "response": ALL_DETAILS},
    "seeded": {
        "method": "SAMPLE",
        "sampling": {"temperature": 0.9, "topK": 40, "topP": 0.9, "typicalP": 0.9, "seed": 7},
        "stopping": {"maxNewTokens": 24},
    },
    "penalties": {
        "stopping": {"maxNewTokens": 24, "minNewTokens": 20},
        "decoding": {
            "repetitionPenalty": 1.3,
            "lengthPenalty": {"startIndex": 5, "decayFactor": 1.02},
        },
    },
    "stop": {"stopping": {"maxNewTokens": 40, "stopSequences": [".", " the"]}},
    "truncated": {"truncateInputTokens": 3, "stopping": {"maxNewTokens": 5}},
}


def ranks_of(server: Server) -> list[int]:
    """Process ids of the ranks that the core has started."""
    core = children(server.process.pid)["tgis.core"]
    words = Path(f"/proc/{core}/task/{core}/children").read_text().split()
    found = [int(word) for word in words]
    assert all(
        b"tgis.engines.rank_main" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found
    )
    return found


def close_to(one: Any, other: Any, key: str = "") -> bool:
    """Whether two answers are equal but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close_to(one[k], other[k], k) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close_to, one, other))
    if key in NUMBERS and isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE
    return bool(one == other)


def collected(outcome: tuple[list[Json], Status | None]) -> Json:
    """A stream's messages as one; how tokens are spread over messages is a matter of timing."""
    messages, error = outcome
    assert error is None
    total: Json = {"text": "", "tokens": [], "inputTokens": []}
    for message in messages:
        total["text"] += message.pop("text", "")
        for key in ("tokens", "inputTokens"):
            total[key] += message.pop(key, [])
        total |= message
    return total


@pytest.fixture(scope="module")
def servers(demo_model_dir: Path) -> Iterator[list[Server]]:
    """One with the whole model, one with two ranks."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(run_server(demo_model_dir, "--num-shard", n)) for n in ("1", "2")
        ]


def ask(server: Server, ask: Callable[[Any], Any]) -> Any:
    with connect_blocking(server.grpc) as client:
        return ask(client)


@pytest.mark.parametrize("name", PARAMS)
def test_answers_are_the_same(servers: list[Server], name: str) -> None:
    request = {"requests": [{"text": text} for text in PROMPTS], "params": PARAMS[name]}
    whole, split = (ask(server, lambda c: c.call("Generate", request)) for server in servers)
    assert not isinstance(whole, Status)
    assert close_to(whole, split), (whole, split)


@pytest.mark.parametrize("name", ["greedy", "details", "seeded"])
def test_streams_are_the_same(servers: list[Server], name: str) -> None:
    request = {"request": {"text": PROMPTS[0]}, "params": PARAMS[name]}
    whole, split = (collected(ask(s, lambda c: c.stream(request))) for s in servers)
    assert close_to(whole, split), (whole, split)


def test_a_cached_prefix_gives_the_same(servers: list[Server]) -> None:
    def text(server: Server, question: str) -> str:
        request = {
            "requests": [{"text": STORY * 8 + question}],
            "params": {"stopping": {"maxNewTokens": 12}},
        }
        answer = ask(server, lambda c: c.call("Generate", request))
        assert isinstance(answer, dict)
        return str(answer["responses"][0]["text"])

    for question in ("The dog", "The cat", "The dog"):
        whole, split = (text(server, question) for server in servers)
        assert whole == split
    _, metrics = servers[1].get("/metrics")
    lines = [
        line for line in metrics.splitlines() if line.startswith("tgi_prefix_cache_hit_tokens")
    ]
    assert any(float(line.split()[-1]) > 100 for line in lines)


def test_many_at_once(servers: list[Server]) -> None:
    def text(server: Server, number: int) -> Any:
        params = PARAMS["seeded" if number % 2 else "greedy"]
        request = {"requests": [{"text": PROMPTS[number % 4]}], "params": params}
        return ask(server, lambda c: c.call("Generate", request))

    with ThreadPoolExecutor(12) as pool:
        whole, split = (list(pool.map(text, [s] * 12, range(12))) for s in servers)
    assert whole == split


def test_nothing_listens_beyond_loopback(servers: list[Server]) -> None:
    server = servers[1]
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    for pid in [children(server.process.pid)["tgis.core"], *ranks_of(server)]:
        assert listening(pid) <= loopback
    assert listening(ranks_of(server)[0])


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@contextmanager
def long_streams(server: Server, count: int) -> Iterator[list[Any]]:
    """Streams that have begun; at the end of the block, how they ended."""
    request = {
        "request": {"text": PROMPTS[0]},
        "params": {"stopping": {"maxNewTokens": 500, "minNewTokens": 500}},
    }
    outcomes: list[Any] = []
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(ask, server, lambda c: c.stream(request)) for _ in range(count)]
        wait_until(lambda: "tgi_batch_current_size 2.0" in server.get("/metrics")[1])
        yield outcomes
        outcomes += [future.result() for future in futures]


@pytest.mark.parametrize(
    ("number", "seconds", "said"),
    [
        (signal.SIGKILL, 2.0, "rank 1 died (SIGKILL); ending the 2 ranks"),
        pytest.param(*(signal.SIGSTOP, 6.0, "rank 1 has been silent for"), marks=pytest.mark.slow),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_ends_all_requests_and_is_replaced(
    demo_model_dir: Path, number: signal.Signals, seconds: float, said: str
) -> None:
    before = shared_memory()
    with run_server(demo_model_dir, "--num-shard", "2") as server:
        front = children(server.process.pid)["tgis.front"]
        old = [children(server.process.pid)["tgis.core"], *ranks_of(server)]
        with long_streams(server, 2) as outcomes:
            os.kill(old[1], number)
            start = time.monotonic()
        assert time.monotonic() - start < seconds + 4.0  # to notice; the rest is for a busy machine
        for _, error in outcomes:
            assert isinstance(error, Status)
            assert error.code == "UNAVAILABLE"
        assert said in server.log()
        assert "Traceback" not in server.log()
        wait_until(lambda: not any(alive(pid) for pid in old))
        server.wait_ready()
        request = {"requests": [{"text": PROMPTS[0]}], "params": PARAMS["greedy"]}
        assert isinstance(ask(server, lambda c: c.call("Generate", request)), dict)
        assert children(server.process.pid)["tgis.front"] == front
        new = [children(server.process.pid)["tgis.core"], *ranks_of(server)]
    wait_until(lambda: not any(alive(pid) for pid in new))
    assert shared_memory() <= before


STUCK = """
import signal, sys, time
if "tgis.engines.rank_main" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))
"""


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_named(demo_model_dir: Path, tmp_path: Path) -> None:
    """Its process beats on, but its main thread does not come to the next collective."""
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = ["--num-shard", "2"]
    with run_server(demo_model_dir, *flags, env={"PYTHONPATH": path}) as server:
        with long_streams(server, 2) as outcomes:
            os.kill(ranks_of(server)[0], signal.SIGUSR1)
            start = time.monotonic()
        assert time.monotonic() - start < 5.0 + 4.0  # to notice; the rest is for a busy machine
        assert all(error.code == "UNAVAILABLE" for _, error in outcomes)
        assert "rank 1 is stuck before collective" in server.log()
        server.wait_ready()
        request = {"requests": [{"text": PROMPTS[0]}], "params": PARAMS["greedy"]}
        assert isinstance(ask(server, lambda c: c.call("Generate", request)), dict)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supervisor", "front", "core"])
def test_no_rank_outlives_the_server(demo_model_dir: Path, tmp_path: Path, victim: str) -> None:
    before = shared_memory()
    server = start_server(demo_model_dir, tmp_path, "--num-shard", "2")
    try:
        server.wait_ready()
        pids = children(server.process.pid)
        ranks = ranks_of(server)
        pids["supervisor"] = server.process.pid
        os.kill(pids[victim if victim == "supervisor" else f"tgis.{victim}"], signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in (pids["tgis.core"], *ranks)))
        zombies = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
        if victim == "core":  # nobody is left unburied either
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in zombies))
        assert shared_memory() <= before
    finally:
        if server.process.poll() is None:
            server.kill()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num-shard", "3"], "`num_heads` must be divisible by `num_shards`"),
        pytest.param(
            ["--num-shard", "2", "--master-addr", "203.0.113.1"],
            "MASTER_ADDR = 203.0.113.1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--num-shard", "2", "--kv-cache-memory", "1MB"],
            "--kv-cache-memory",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_split_is_one_line(
    demo_model_dir: Path, tmp_path: Path, flags: list[str], text: str
) -> None:
    server = start_server(demo_model_dir, tmp_path, *flags)
    assert server.process.wait(60) in (1, 2)
    (line,) = [x for x in server.log().splitlines() if x.startswith("tgis serve:")]
    assert text in line
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_ranks_that_are_started_elsewhere(demo_model_dir: Path, tmp_path: Path) -> None:
    """Two servers on two addresses, as torchrun starts them on two machines."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(free_ports(1)[0] - 1)}
    other = start_server(demo_model_dir, tmp_path, env=env | {"RANK": "1"})
    try:
        with run_server(demo_model_dir, env=env | {"RANK": "0"}) as server:
            request = {"requests": [{"text": PROMPTS[0]}], "params": PARAMS["greedy"]}
            first = ask(server, lambda c: c.call("Generate", request))
            assert isinstance(first, dict)
            core = children(server.process.pid)["tgis.core"]
            rank = children(other.process.pid)["tgis.engines.rank_main"]
            assert listening(core) == {"0200007F"}
            assert listening(rank) == {"0100007F"}
            os.kill(rank, signal.SIGKILL)
            wait_until(lambda: server.get("/health")[0] == 503)
            server.wait_ready()
            assert not alive(core)
            assert ask(server, lambda c: c.call("Generate", request)) == first
        other.process.send_signal(signal.SIGTERM)
        assert other.process.wait(20) == 0
        assert "Traceback" not in other.log()
    finally:
        if other.process.poll() is None:
            other.kill()
