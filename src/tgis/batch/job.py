"""A job: an input file cut into shards, and a directory that says which of them are done.

A shard is a run of lines of the input and one file of the output, which appears whole or not at
all. So a job can be ended at any moment, by anything, and started again: what is there is kept,
what is not is computed, and every row of the input has exactly one row of the output.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.json_format import MessageToDict

from tgis import __version__
from tgis.batch.rows import Malformed, Prompt, encode, parse_line, parse_params
from tgis.errors import ConfigError
from tgis.proto import generation_pb2 as pb

MANIFEST = "manifest.json"
_LOCK = ".lock"
_SHOWN_LINES = 20


class Shard(msgspec.Struct, frozen=True):
    """Lines `first_line`, `first_line` + 1, ... of the input, from byte `offset` on."""

    number: int
    offset: int
    num_bytes: int
    first_line: int  # the first line of a file is 1

    @property
    def name(self) -> str:
        """Of its file."""
        return f"shard-{self.number:06d}.jsonl"


class Scan(msgspec.Struct, frozen=True):
    """What one pass over the input has found."""

    sha256: str
    num_rows: int
    shards: list[Shard]
    malformed: list[tuple[int, str]]  # lines and what is wrong with them


class Job(msgspec.Struct, frozen=True):
    """Everything that a worker needs to know to make a shard."""

    input: str
    output: str
    params: dict[str, Any]  # fmaas.Parameters as proto3 JSON

    @property
    def common(self) -> pb.Parameters:
        """The parameters of rows that have none of their own."""
        return parse_params(self.params)

    def rows(self, shard: Shard) -> Iterator[tuple[int, Prompt | Malformed]]:
        """The shard's rows with their line numbers; empty lines are none."""
        common = self.common
        with open(self.input, "rb") as file:
            file.seek(shard.offset)
            lines = file.read(shard.num_bytes).split(b"\n")
        for number, line in enumerate(lines, shard.first_line):
            if line.strip():
                yield number, _parsed(line, common)

    def write(self, shard: Shard, rows: Sequence[dict[str, Any]]) -> None:
        """Make the shard's file, whole."""
        _write_whole(Path(self.output, shard.name), b"".join(map(encode, rows)))

    def is_done(self, shard: Shard) -> bool:
        """Whether the shard's file is there."""
        return Path(self.output, shard.name).exists()


def scan(path: Path, params: pb.Parameters, rows_per_shard: int) -> Scan:
    """Read the input once: where its shards lie, and what is wrong with it.

    Raises:
        ConfigError: it cannot be read.
    """
    digest = hashlib.sha256()
    shards: list[Shard] = []
    malformed: list[tuple[int, str]] = []
    num_rows = in_shard = offset = start = 0
    number, first_line = 0, 1
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                offset += len(line)
                if not line.strip():
                    continue
                num_rows, in_shard = num_rows + 1, in_shard + 1
                if isinstance(row := _parsed(line, params), Malformed):
                    malformed.append((number, str(row)))
                if in_shard == rows_per_shard:
                    shards.append(Shard(len(shards), start, offset - start, first_line))
                    start, in_shard, first_line = offset, 0, number + 1
    except OSError as error:
        raise ConfigError(f"--input={path}: cannot be read: {error.strerror}") from error
    if in_shard:
        shards.append(Shard(len(shards), start, offset - start, first_line))
    return Scan(digest.hexdigest(), num_rows, shards, malformed)


def name_lines(malformed: Sequence[tuple[int, str]]) -> str:
    """The lines that are malformed, for the operator."""
    shown = "; ".join(f"line {number}: {text}" for number, text in malformed[:_SHOWN_LINES])
    rest = len(malformed) - _SHOWN_LINES
    return shown + (f"; and {rest} more" if rest > 0 else "")


@contextmanager
def opened(output: Path) -> Iterator[None]:
    """Hold the output directory, which is made if it is not there.

    Raises:
        ConfigError: it cannot be written, or another job works in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"--output={output}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"--output={output}: another job is at work there") from None
    try:
        for left_over in output.glob("*.part"):
            with suppress(FileNotFoundError):
                left_over.unlink()
        yield
    finally:
        os.close(lock)


def identity(found: Scan, params: pb.Parameters, rows_per_shard: int, model: str) -> dict[str, Any]:
    """What must be the same for a job to go on where another one has stopped."""
    return {
        "model": model,
        "input_sha256": found.sha256,
        "input_rows": found.num_rows,
        "rows_per_shard": rows_per_shard,
        "params": MessageToDict(params, preserving_proto_field_name=True),
    }


def begin(output: Path, job: dict[str, Any]) -> None:
    """Write the manifest, or see that the one that is there is of the same job.

    Raises:
        ConfigError: it is of another job; the text names what differs.
    """
    path = output / MANIFEST
    if not path.exists():
        if any(output.glob("shard-*.jsonl")):
            raise ConfigError(f"--output={output}: has shards but no {MANIFEST}; choose another")
        _write_manifest(path, job, None)
        return
    try:
        there = json.loads(path.read_bytes())["job"]
        differing = [key for key in job if there.get(key) != job[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--output={output}: {MANIFEST} cannot be read") from None
    if differing:
        raise ConfigError(
            f"--output={output}: holds another job, which differs in {', '.join(differing)};"
            " choose another directory"
        )


def finish(output: Path, job: dict[str, Any], shards: Sequence[Shard]) -> dict[str, int]:
    """Count all rows, check that none is missing or twice, and say so in the manifest.

    Raises:
        ConfigError: the directory has been tampered with.
    """
    num_rows = num_errors = 0
    for shard in shards:
        for line in (output / shard.name).read_bytes().splitlines():
            num_rows += 1
            num_errors += "error" in json.loads(line)
    if num_rows != job["input_rows"]:
        raise ConfigError(f"--output={output}: {num_rows} rows instead of {job['input_rows']}")
    result = {"rows": num_rows, "errors": num_errors, "shards": len(shards)}
    _write_manifest(output / MANIFEST, job, result)
    return result


def _parsed(line: bytes, common: pb.Parameters) -> Prompt | Malformed:
    try:
        return parse_line(line, common)
    except Malformed as error:
        return error


def _write_manifest(path: Path, job: dict[str, Any], result: dict[str, int] | None) -> None:
    manifest = {"format": 1, "tgis": __version__, "job": job, "complete": result is not None}
    text = json.dumps(manifest | ({"result": result} if result else {}), indent=2)
    _write_whole(path, text.encode() + b"\n")


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, also after a power cut."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
