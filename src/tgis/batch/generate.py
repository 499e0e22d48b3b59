"""Sending rows to a server of our own, as many at once as keep it busy, whatever happens to it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import grpc
import msgspec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tgis.batch.job import Job, Shard
from tgis.batch.rows import MALFORMED, Malformed, Prompt, answer, failure
from tgis.config import Config
from tgis.errors import StartupError
from tgis.hosted import HostedServer, loopback
from tgis.proto import generation_pb2 as pb
from tgis.proto.generation_pb2_grpc import GenerationServiceStub

log = logging.getLogger("tgis.batch")

Row = dict[str, Any]
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_MAX_TRIES = 6
_TRIES_TOGETHER = 2  # what was there when an engine died so often is tried alone
_RETRY_SECONDS = 0.25
_MAX_STARTS = 10
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]


class RowFailed(Exception):
    """A row has no answer, and the job is to stop at the first such row."""


def settings(config: Config, in_flight: int) -> Config:
    """What the server of a batch is told: only this machine reaches it, and it takes all rows."""
    most = max(config.max_concurrent_requests, in_flight)
    return msgspec.structs.replace(loopback(config), max_concurrent_requests=most)


class Server:
    """A server that is started anew when it has ended.

    Args:
        config: from `settings`.
        log_to: where its log goes.
    """

    _hosted: HostedServer
    _stub: GenerationServiceStub

    def __init__(self, config: Config, log_to: IO[str] | int) -> None:
        self._config = config
        self._log = log_to
        self._channels: list[grpc.aio.Channel] = []
        self._starting = asyncio.Lock()
        self._alone = asyncio.Lock()
        self._num_starts = 0

    async def __aenter__(self) -> "Server":
        await self._start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for channel in self._channels:
            await channel.close(None)
        await asyncio.to_thread(self._hosted.stop)

    async def generate(self, request: pb.BatchedGenerationRequest) -> pb.GenerationResponse:
        """One answer; a server that dies meanwhile is replaced.

        Raises:
            grpc.aio.AioRpcError: the server refuses the request, or dies of it again and again.
            StartupError: there is no server any more.
        """
        for tries in range(1, _MAX_TRIES + 1):
            try:
                if tries <= _TRIES_TOGETHER:
                    return await self._call(request)
                async with self._alone:
                    return await self._call(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRIED or tries == _MAX_TRIES:
                    raise
            await self._recover()
        raise AssertionError("unreachable")

    async def _call(self, request: pb.BatchedGenerationRequest) -> pb.GenerationResponse:
        response: pb.BatchedGenerationResponse = await self._stub.Generate(request)
        return response.responses[0]

    async def _recover(self) -> None:
        """Wait until there is a server that answers again."""
        async with self._starting:
            if ended := self._hosted.ended:
                log.warning("the server ended (%s); starting another one", ended)
                await self._start()
        health = health_pb2_grpc.HealthStub(self._channels[-1])
        while not self._hosted.ended:
            await asyncio.sleep(_RETRY_SECONDS)
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await health.Check(health_pb2.HealthCheckRequest())
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    async def _start(self) -> None:
        self._num_starts += 1
        if self._num_starts > _MAX_STARTS:
            raise StartupError(f"the server ended {_MAX_STARTS} times; giving up")
        self._hosted = HostedServer(self._config, self._log)
        try:
            serving = await asyncio.to_thread(self._hosted.wait)
        except BaseException:
            self._hosted.stop(0)
            raise
        # The old channel stays open: closing it would cancel calls that have just failed.
        address = f"127.0.0.1:{serving.grpc_port}"
        self._channels.append(grpc.aio.insecure_channel(address, _OPTIONS))
        self._stub = GenerationServiceStub(self._channels[-1])  # type: ignore[no-untyped-call]


class Progress:
    """What has been done; `shown` is told of it now and then."""

    def __init__(self, shown: Callable[["Progress"], None]) -> None:
        self.num_rows = 0
        self.num_errors = 0
        self.num_tokens = 0
        self._shown = shown

    def add(self, row: Row) -> None:
        """Count one row of the output."""
        self.num_rows += 1
        self.num_errors += "error" in row
        self.num_tokens += row.get("generated_token_count", 0)
        self._shown(self)


@dataclass
class _OpenShard:
    """A shard of which some rows are under way."""

    shard: Shard
    rows: dict[int, Row] = field(default_factory=dict)  # by line
    num_left: int = 1  # one more than rows under way, until all have been sent


class Batch:
    """Makes shards: rows of several are under way at once, each file is written when complete.

    Args:
        in_flight: rows that are under way at once.
        stop: end at the first row without an answer.
    """

    def __init__(
        self, job: Job, server: Server, in_flight: int, progress: Progress, *, stop: bool = False
    ) -> None:
        self._job = job
        self._server = server
        self._window = asyncio.Semaphore(in_flight)
        self._progress = progress
        self._stop = stop

    async def run(self, shards: Iterable[Shard]) -> None:
        """Make every shard.

        Raises:
            RowFailed: a row has no answer, and the job is to stop then.
            StartupError: there is no server any more.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for shard in shards:
                    await self._send(shard, group)
        except* (RowFailed, StartupError) as errors:
            raise _first(errors) from None

    async def _send(self, shard: Shard, group: asyncio.TaskGroup) -> None:
        opened = _OpenShard(shard)
        for line, prompt in self._job.rows(shard):
            opened.num_left += 1
            if isinstance(prompt, Malformed):
                self._take(opened, failure(line, None, MALFORMED, str(prompt)))
                continue
            await self._window.acquire()
            group.create_task(self._generate(opened, line, prompt))
        self._close(opened)

    async def _generate(self, opened: _OpenShard, line: int, prompt: Prompt) -> None:
        try:
            row = answer(line, prompt, await self._server.generate(prompt.request))
        except grpc.aio.AioRpcError as error:
            row = failure(line, prompt, error.code().name, error.details() or "")
        finally:
            self._window.release()
        self._take(opened, row)

    def _take(self, opened: _OpenShard, row: Row) -> None:
        if self._stop and "error" in row:
            raise RowFailed(f"line {row['line']}: {row['error']['message']}")
        opened.rows[row["line"]] = row
        self._progress.add(row)
        self._close(opened)

    def _close(self, opened: _OpenShard) -> None:
        opened.num_left -= 1
        if opened.num_left == 0:
            self._job.write(opened.shard, [opened.rows[line] for line in sorted(opened.rows)])


def _first(errors: BaseExceptionGroup) -> BaseException:
    """One of the errors in a group."""
    inner = errors.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
