"""Running a job from its beginning to its end, here or in workers of a Ray cluster."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tgis.batch.generate import Batch, Progress, RowFailed, Server, settings
from tgis.batch.job import Job, Scan, Shard, begin, finish, identity, name_lines, opened, scan
from tgis.batch.rows import Malformed, parse_params
from tgis.cluster.options import RayOptions
from tgis.config import Config
from tgis.errors import ConfigError, StartupError
from tgis.hub.resolve import resolve

_PROGRESS_SECONDS = 5.0
SERVER_LOG = "server.log"


@dataclass(frozen=True)
class Options:
    """A job, as it was asked for."""

    input: Path
    output: Path
    params: dict[str, Any] = field(default_factory=dict)  # fmaas.Parameters as proto3 JSON
    rows_per_shard: int = 1000
    in_flight: int = 256  # rows under way at once, in each worker
    stop: bool = False  # at the first row without an answer
    ray: RayOptions | None = None


def run(options: Options, config: Config) -> int:
    """Run a job; returns the exit code.

    Raises:
        StartupError: the job cannot run, or cannot go on; what is complete is kept.
    """
    try:
        params = parse_params(options.params)
    except Malformed as error:
        raise ConfigError(f"--{error}") from None
    model = resolve(config).path  # known to be there before anything is written
    found = scan(options.input, params, options.rows_per_shard)
    _report_malformed(options, found)
    output = options.output.absolute()
    job = Job(str(options.input.absolute()), str(output), options.params)
    about = identity(found, params, options.rows_per_shard, model)
    with opened(output):
        begin(output, about)
        shards = [shard for shard in found.shards if not job.is_done(shard)]
        done = len(found.shards) - len(shards)
        say(f"{found.num_rows} rows in {len(found.shards)} shards, {done} of them done already")
        if shards:
            _make(options, config, job, shards)
        result = finish(output, about, found.shards)
    say(f"complete: {result['rows']} rows, {result['errors']} of them errors, in {output}")
    return 0


def say(text: str) -> None:
    """Tell the operator."""
    print(f"tgis batch: {text}", file=sys.stderr, flush=True)


def _report_malformed(options: Options, found: Scan) -> None:
    if not found.malformed:
        return
    text = f"{options.input}: {len(found.malformed)} malformed: {name_lines(found.malformed)}"
    if options.stop:
        raise StartupError(f"{text}; nothing was computed")
    say(text)


def _make(options: Options, config: Config, job: Job, shards: Sequence[Shard]) -> None:
    config = settings(config, options.in_flight)
    try:
        if options.ray is None:
            _make_here(options, config, job, shards)
            return
        from tgis.batch.ray_data import make_shards

        due = _due()

        def made(count: int) -> None:
            if due() or count == len(shards):
                say(f"{count} of {len(shards)} shards")

        make_shards(
            job, shards, config, options.in_flight, options.ray, stop=options.stop, made=made
        )
    except RowFailed as error:
        text = f"{options.input}: {error}; complete shards are kept"
        raise StartupError(text) from None


def _make_here(options: Options, config: Config, job: Job, shards: Sequence[Shard]) -> None:
    async def make(log: IO[str]) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with Server(config, log) as server:
            progress = Progress(_shower())
            batch = Batch(job, server, options.in_flight, progress, stop=options.stop)
            await batch.run(shards)

    try:
        with Path(job.output, SERVER_LOG).open("a") as log:
            asyncio.run(make(log))
    except asyncio.CancelledError:
        error = StartupError("told to end; complete shards are kept, and the job can go on")
        error.exit_code = 128 + signal.SIGTERM
        raise error from None


def _shower() -> Callable[[Progress], None]:
    """Shows progress now and then."""
    start, due = time.monotonic(), _due()

    def show(progress: Progress) -> None:
        if due():
            rate = progress.num_tokens / (time.monotonic() - start)
            say(f"{progress.num_rows} rows, {progress.num_errors} errors, {rate:.0f} tokens/s")

    return show


def _due() -> Callable[[], bool]:
    """True when some seconds have passed since the last time."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < _PROGRESS_SECONDS:
            return False
        last = now
        return True

    return due
