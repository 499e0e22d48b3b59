"""Shards: what they cover, how they appear, and who may make them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgis.batch.job import MANIFEST, Job, Shard, begin, finish, identity, name_lines, opened, scan
from tgis.batch.rows import Malformed, parse_params
from tgis.errors import ConfigError

PARAMS = parse_params({})
LINE = b'{"text": "x"}'


def job_of(directory: Path, data: bytes) -> Job:
    path = directory / "in.jsonl"
    path.write_bytes(data)
    return Job(str(path), str(directory / "out"), {})


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([LINE, b"", b"  ", b"{", b'{"text": "\xc3\xa9"}\r']), max_size=12),
    st.booleans(),
    st.integers(1, 5),
)
def test_shards_cover_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bool, size: int
) -> None:
    data = b"\n".join(lines) + (b"\n" if newline else b"")
    job = job_of(tmp_path_factory.mktemp("job"), data)
    found = scan(Path(job.input), PARAMS, size)
    rows = [row for shard in found.shards for row in job.rows(shard)]
    expected = [number for number, line in enumerate(lines, 1) if line.strip()]
    assert [number for number, _ in rows] == expected
    assert found.num_rows == len(expected)
    bad = [number for number, row in rows if isinstance(row, Malformed)]
    assert [number for number, _ in found.malformed] == bad
    assert bad == [number for number, line in enumerate(lines, 1) if line == b"{"]
    assert all(len(list(job.rows(shard))) == size for shard in found.shards[:-1])


def test_the_input_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        scan(tmp_path / "no.jsonl", PARAMS, 10)


def test_malformed_lines_are_named_but_not_all() -> None:
    text = name_lines([(number, "bad") for number in range(1, 31)])
    assert text.startswith("line 1: bad; line 2: bad")
    assert "line 20: bad" in text
    assert "line 21" not in text
    assert text.endswith("; and 10 more")


def test_a_shard_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, LINE)
    shard = Shard(0, 0, len(LINE), 1)
    with opened(Path(job.output)):

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                job.write(shard, [{"line": 1}])
        assert not job.is_done(shard)
        job.write(shard, [{"line": 1, "text": "\ud800\n"}])
        assert job.is_done(shard)
    with opened(Path(job.output)):  # what was left over is gone
        assert not list(Path(job.output).glob("*.part"))
    (row,) = Path(job.output, shard.name).read_text().splitlines()
    assert json.loads(row) == {"line": 1, "text": "?\n"}


def test_one_job_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="another job"), opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


def test_the_output_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), opened(tmp_path / "file"):
        pass


def about(tmp_path: Path, data: bytes, params: dict[str, Any], size: int = 1) -> dict[str, Any]:
    job = job_of(tmp_path, data)
    parsed = parse_params(params)
    return identity(scan(Path(job.input), parsed, size), parsed, size, "model")


def test_a_job_goes_on_only_as_it_began(tmp_path: Path) -> None:
    job = about(tmp_path, LINE, {"stopping": {"max_new_tokens": 5}})
    begin(tmp_path, job)
    begin(tmp_path, about(tmp_path, LINE, {"stopping": {"maxNewTokens": 5}}))  # the same
    with pytest.raises(ConfigError, match="differs in params;"):
        begin(tmp_path, about(tmp_path, LINE, {"stopping": {"max_new_tokens": 6}}))
    with pytest.raises(ConfigError, match="differs in input_sha256, input_rows;"):
        begin(tmp_path, job | about(tmp_path, LINE + b"\n" + LINE, {}) | {"params": job["params"]})
    with pytest.raises(ConfigError, match="differs in rows_per_shard;"):
        begin(tmp_path, job | {"rows_per_shard": 2})
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        begin(tmp_path, job)


def test_shards_of_nobody_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.jsonl").touch()
    with pytest.raises(ConfigError, match="has shards but no"):
        begin(tmp_path, {})


def test_the_end_counts_all_rows(tmp_path: Path) -> None:
    job = job_of(tmp_path, LINE + b"\n" + LINE)
    found = scan(Path(job.input), PARAMS, 1)
    description = identity(found, PARAMS, 1, "model")
    output = Path(job.output)
    with opened(output):
        begin(output, description)
        job.write(found.shards[0], [{"line": 1}])
        job.write(found.shards[1], [])
        with pytest.raises(ConfigError, match="1 rows instead of 2"):
            finish(output, description, found.shards)
        job.write(found.shards[1], [{"line": 2, "error": {}}])
        assert finish(output, description, found.shards) == {"rows": 2, "errors": 1, "shards": 2}
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["complete"] is True
    assert manifest["result"]["errors"] == 1
