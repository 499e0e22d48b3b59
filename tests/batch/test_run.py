"""`tgis batch` as a process: answers, errors, deaths of every process, and going on."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.kit.client import connect_blocking
from tests.kit.processes import alive, children, wait_until
from tests.kit.server import run_server, scrubbed_environment

from tgis.demo import model_dir

# Processes start and compute for as long as a busy machine lets them.
pytestmark = pytest.mark.timeout(900)

PARAMS = {"stopping": {"max_new_tokens": 24, "min_new_tokens": 24}}
SERVER = ("--dtype", "float32", "--threads", "1")
Row = dict[str, Any]


def write(path: Path, rows: list[Row | str]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines))
    return path


def start(source: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tgis.cli.main", "batch", "--input", str(source)]
    command += ["--output", str(output), "--params", json.dumps(PARAMS), *SERVER, *words]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=scrubbed_environment(source.parent),
    )


def run(source: Path, output: Path, *words: str) -> tuple[int, str]:
    with start(source, output, *words) as process:
        _, errors = process.communicate(timeout=500)
    return process.returncode, errors


def rows_of(output: Path) -> list[Row]:
    shards = sorted(output.glob("shard-*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]


def manifest(output: Path) -> Row:
    content: Row = json.loads((output / "manifest.json").read_text())
    return content


def prompts(number: int) -> list[Row | str]:
    return [{"id": f"row {index}", "text": f"Once {index} times"} for index in range(number)]


def descendants(pid: int) -> dict[str, int]:
    found = {}
    for name, child in children(pid).items():
        found[name] = child
        found |= descendants(child)
    return found


def test_answers_are_those_of_a_server(tmp_path: Path) -> None:
    rows = prompts(20)
    rows[4:4] = ["", "{not json", {"text": "x", "params": {"stopping": {"max_new_tokens": 99999}}}]
    rows[9:9] = [{"text": "stop", "params": {"stopping": {"max_new_tokens": 3}}}]
    output = tmp_path / "out"
    code, errors = run(write(tmp_path / "in.jsonl", rows), output, "--rows-per-shard", "8")
    assert code == 0, errors
    assert "1 malformed: line 6: not JSON" in errors
    found = rows_of(output)
    numbers = [number for number, row in enumerate(rows, 1) if row]
    assert [row["line"] for row in found] == numbers
    by_line = {row["line"]: row for row in found}
    assert by_line[6]["error"]["code"] == "MALFORMED"
    assert by_line[7]["error"]["code"] == "INVALID_ARGUMENT"
    # min_new_tokens of the common parameters is above this row's own max_new_tokens
    assert by_line[10]["error"]["code"] == "INVALID_ARGUMENT"
    assert manifest(output)["result"] == {"rows": 23, "errors": 3, "shards": 3}
    with (
        run_server(model_dir(), "--threads", "1") as server,
        connect_blocking(server.grpc) as client,
    ):
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or number in (7, 10):
                continue
            request = {"requests": [{"text": row["text"]}], "params": PARAMS}
            (expected,) = client.call("Generate", request)["responses"]  # type: ignore[index]
            assert by_line[number]["text"] == expected["text"]
            assert by_line[number]["id"] == row["id"]
            assert by_line[number]["generated_token_count"] == 24


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A long input, and what it becomes when nothing dies."""
    directory = tmp_path_factory.mktemp("undisturbed")
    source = write(directory / "in.jsonl", prompts(600))
    code, errors = run(source, directory / "out", "--rows-per-shard", "50")
    assert code == 0, errors
    return source, rows_of(directory / "out")


@pytest.mark.slow
def test_a_worker_is_killed_twice(undisturbed: tuple[Path, list[Row]], tmp_path: Path) -> None:
    """Once its core, once the whole server; every row still has the one answer."""
    source, expected = undisturbed
    output = tmp_path / "out"
    with start(source, output, "--rows-per-shard", "50") as process:
        for name in ("tgis.core", "tgis.hosted"):
            shards = len(list(output.glob("shard-*.jsonl")))
            wait_until(lambda: len(list(output.glob("shard-*.jsonl"))) > shards, 300)  # noqa: B023
            victim = descendants(process.pid)[name]
            subprocess.run(["kill", "-KILL", str(victim)], check=True)
            wait_until(lambda: descendants(process.pid).get(name, victim) != victim, 300)  # noqa: B023
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert "starting another one" in errors
    assert rows_of(output) == expected
    assert manifest(output)["result"] == {"rows": 600, "errors": 0, "shards": 12}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_that_was_ended_goes_on(
    undisturbed: tuple[Path, list[Row]], tmp_path: Path, number: signal.Signals
) -> None:
    source, expected = undisturbed
    output = tmp_path / "out"
    with start(source, output, "--rows-per-shard", "50") as process:
        wait_until(lambda: len(list(output.glob("shard-*.jsonl"))) > 0, 300)
        others = descendants(process.pid)
        assert others
        process.send_signal(number)
        _, errors = process.communicate(timeout=500)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
    wait_until(lambda: not any(map(alive, others.values())))
    shards = {path: path.stat().st_mtime_ns for path in output.glob("shard-*.jsonl")}
    assert 0 < len(shards) < 12
    assert manifest(output)["complete"] is False
    code, errors = run(source, output, "--rows-per-shard", "50")
    assert code == 0, errors
    assert f"{len(shards)} of them done already" in errors
    assert rows_of(output) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())


def test_the_guide(tmp_path: Path) -> None:
    """Its command with its input gives rows with the fields of its output."""
    guide = (Path(__file__).parents[2] / "docs" / "batch.md").read_text()
    command = re.search(r"^tgis batch MODEL (.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    source, shown = re.findall(r"^```json\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text(source)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    result = subprocess.run(
        [sys.executable, "-m", "tgis.cli.main", "batch", str(model_dir()), *words, *SERVER],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=scrubbed_environment(tmp_path),
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    answered, failed = map(json.loads, shown.splitlines())
    rows = rows_of(tmp_path / "answers")
    assert [row["line"] for row in rows] == [1, 2]
    assert set(rows[0]) == set(answered)
    assert set(answered) | {"id"} <= set(rows[1])
    assert rows[1]["id"] == failed["id"] == "fr-1"
    assert (tmp_path / "answers" / "server.log").exists()


def test_stops_at_the_first_row_without_an_answer(tmp_path: Path) -> None:
    long = {"text": "x", "params": {"stopping": {"max_new_tokens": 99999}}}
    source = write(tmp_path / "in.jsonl", [*prompts(3), long, *prompts(3)])
    code, errors = run(source, tmp_path / "out", "--on-error", "stop", "--rows-per-shard", "3")
    assert code == 1
    assert "line 4: max_new_tokens must be <=" in errors
    assert "Traceback" not in errors
    assert manifest(tmp_path / "out")["complete"] is False


def test_stops_before_it_computes_if_lines_are_malformed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*prompts(1), "{", "7"])
    code, errors = run(source, tmp_path / "out", "--on-error", "stop")
    assert code == 1
    assert "2 malformed: line 2: not JSON" in errors
    assert "line 3: not a JSON object; nothing was computed" in errors
    assert not (tmp_path / "out").exists()


def test_an_empty_input_is_complete(tmp_path: Path) -> None:
    code, errors = run(write(tmp_path / "in.jsonl", []), tmp_path / "out")
    assert code == 0, errors
    assert manifest(tmp_path / "out")["result"] == {"rows": 0, "errors": 0, "shards": 0}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--in-flight", "0"], "--in-flight: '0': must be an integer from 1"),
        (["--params", "{"], "--params: not JSON"),
        (["--params", "@/no/such/file"], "/no/such/file: cannot be read"),
        (["--params", '{"topk": 1}'], "--params: Message type"),
        (["--on-eror", "stop"], "--on-eror: unknown setting"),
        (["--model-name", "/no/model"], "/no/model"),
        (["--ray-replicas", "2"], "--ray-replicas: has no effect without --ray"),
    ],
)
def test_bad_words(tmp_path: Path, words: list[str], part: str) -> None:
    source = write(tmp_path / "in.jsonl", prompts(1))
    code, errors = run(source, tmp_path / "out", *words)
    assert code in (1, 2), errors
    (line,) = errors.splitlines()
    assert part in line
    assert not (tmp_path / "out").exists()
