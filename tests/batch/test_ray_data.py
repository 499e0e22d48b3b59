"""`tgis batch --ray`: the same rows as without, also when workers die."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import alive, wait_until
from tests.kit.ray_cluster import (
    WORKER,
    descendants,
    named,
    ray_directory,
    ray_environment,
    require_ray,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PARAMS = {"stopping": {"max_new_tokens": 40, "min_new_tokens": 40}}
NUM_ROWS, NUM_SHARDS = 1200, 24
Row = dict[str, Any]


@pytest.fixture
def directory() -> Iterator[Path]:
    require_ray()
    with ray_directory() as path:
        yield path


def start(source: Path, output: Path, directory: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tgis.cli.main", "batch", "--input", str(source)]
    command += ["--output", str(output), "--params", json.dumps(PARAMS), "--dtype", "float32"]
    command += ["--threads", "1", "--rows-per-shard", str(NUM_ROWS // NUM_SHARDS)]
    return subprocess.Popen(
        [*command, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ray_environment(directory),
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], below: dict[int, str] | None = None) -> str:
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    wait_until(lambda: not any(map(alive, below or {})), 300)
    return errors


def rows_of(output: Path) -> list[Row]:
    shards = sorted(output.glob("shard-*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]


def test_a_worker_is_killed_twice(directory: Path) -> None:
    source, output = directory / "in.jsonl", directory / "out"
    prompts: list[Row] = [{"id": n, "text": f"Once {n} times"} for n in range(NUM_ROWS)]
    lines = [json.dumps(prompt) for prompt in prompts]
    lines[5] = "{"
    source.write_text("\n".join(lines))
    with start(source, directory / "alone", directory) as process:
        end(process)
    ray = ("--ray", "--ray-replicas", "2", "--ray-cpus", "0.5")
    with start(source, output, directory, *ray) as process:
        for _ in range(2):
            count = len(list(output.glob("shard-*.jsonl")))
            wait_until(lambda: len(list(output.glob("shard-*.jsonl"))) > count, 300)  # noqa: B023
            before = named(process.pid, WORKER)
            os.kill(max(before), signal.SIGKILL)
            wait_until(lambda: bool(named(process.pid, WORKER) - before), 300)  # noqa: B023
        assert len(list(output.glob("shard-*.jsonl"))) < NUM_SHARDS, "too quick to be killed"
        end(process, descendants(process.pid))
    assert [row["line"] for row in rows_of(output)] == list(range(1, NUM_ROWS + 1))
    assert rows_of(output) == rows_of(directory / "alone")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["result"] == {"rows": NUM_ROWS, "errors": 1, "shards": NUM_SHARDS}


def test_stops_at_the_first_row_without_an_answer(directory: Path) -> None:
    source = directory / "in.jsonl"
    long = {"text": "x", "params": {"stopping": {"max_new_tokens": 99999}}}
    source.write_text(json.dumps(long))
    words = ("--ray", "--ray-cpus", "0.5", "--on-error", "stop")
    with start(source, directory / "out", directory, *words) as process:
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 1
    assert "line 1: max_new_tokens must be <=" in errors.splitlines()[-1]
