"""The front's process: everything that clients talk to."""

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from aiohttp import web

from tgis.config import Config, effective_limits
from tgis.control import Alive, Boot, Channel, Drain, Fatal, Serving, ToChild, open_child
from tgis.errors import StartupError
from tgis.front import auth, http_api
from tgis.front.accounts import Accounts
from tgis.front.adapters import Adapters
from tgis.front.grpc_api import GenerationService
from tgis.front.grpc_server import GENERATION_SERVICE, GrpcServer
from tgis.front.health import Health, State
from tgis.front.intake import Intake
from tgis.front.link import CoreLink
from tgis.front.params import Limits
from tgis.front.probe import Doubt, Probe
from tgis.front.progress import report_progress
from tgis.front.reload import Watched, keep_fresh
from tgis.front.streams import Streams
from tgis.front.tenants import tenants_by
from tgis.front.tls import Tls
from tgis.front.tokenize import TextTokenizer
from tgis.observe import logs
from tgis.observe.metrics import Limits as MetricLimits
from tgis.observe.metrics import Metrics
from tgis.observe.tracing import Tracing
from tgis.text.detokenize import Detokenizer

log = logging.getLogger("tgis.front")

_BEAT_SECONDS = 0.5
_BATCH_BUCKETS = 128
_LAME_DUCK_SECONDS = 0.5  # NOT_SERVING, but still serving
_CUT_OFF_SECONDS = 1.0  # for the errors of what is cut off at the end of the drain to go out
_FLUSH_SECONDS = 2.5


class Front:
    """All parts of the front, made and connected.

    Args:
        boot: what the supervisor says.

    Raises:
        StartupError: the settings or the model's files cannot be used.
    """

    def __init__(self, boot: Boot) -> None:
        config, files = boot.config, boot.files
        bounds = effective_limits(config, files)
        limits = Limits(
            bounds.max_new_tokens, bounds.max_sequence_length, config.default_include_stop_seqs
        )
        self.config = config
        self.metrics = Metrics(
            MetricLimits(
                bounds.max_sequence_length,
                bounds.max_new_tokens,
                config.max_batch_size or _BATCH_BUCKETS,
            ),
            compat=files.name if config.metrics_compat else None,
        )
        self.tls = Tls(config, self.metrics) if config.tls_cert_path else None
        self.keys = auth.watch_keys(config, self.metrics) if config.api_keys_file else None
        self.tracing = (
            Tracing(config.otlp_endpoint, config.otlp_service_name)
            if config.otlp_endpoint
            else None
        )
        tokenizer = TextTokenizer.load(
            Path(boot.tokenizer_path),
            workers=config.tokenization_workers or min(os.cpu_count() or 1, 8),
            add_special_tokens=config.add_special_tokens,
            max_sequence_length=bounds.max_sequence_length,
        )
        detokenizer = Detokenizer(
            tokenizer.raw,
            files.kind,
            eos_token_ids=files.eos_token_ids,
            output_special_tokens=config.output_special_tokens,
        )
        self.streams = Streams(detokenizer, self.metrics)
        self.link = CoreLink(Path(boot.socket_path), self.streams)
        self.streams.link = self.link
        self.health = Health(self.link, config.hang_timeout)
        self.probe = Probe(self.streams, tokenizer)
        self.doubt = Doubt(self.probe, self.health)
        self.streams.on_failure = self.doubt.rise
        accounts = Accounts(self.metrics, log_prompts=config.log_prompts, tracing=self.tracing)
        adapters = Adapters(self.link, self.metrics, enabled=bool(config.prefix_store_path))
        intake = Intake(
            tokenizer,
            adapters,
            limits,
            config.max_concurrent_requests,
            self.metrics,
            fair=config.fair_share_by is not None,
        )
        service = GenerationService(
            intake,
            adapters,
            self.streams,
            tokenizer,
            accounts,
            files.kind,
            limits,
            files.pad_token_id,
            tenants_by(config.fair_share_by),
        )
        self.server = GrpcServer(config, lambda: self.health.is_ready, self._interceptors(config))
        self.server.add_service(GENERATION_SERVICE, service)

    def _interceptors(self, config: Config) -> list[auth.Gate]:
        """The one gate before every RPC, if anything is asked of clients."""
        keys = self.keys
        names = [name.strip() for name in (config.tls_client_names or "").split(",") if name]
        if keys is None and not names:
            return []
        return [auth.Gate(None if keys is None else lambda: keys.value, names, self.metrics)]

    async def listen(self) -> tuple[int, int, web.AppRunner]:
        """Open both ports; returns the gRPC port, the HTTP port, and what serves HTTP.

        Raises:
            ConfigError: a port cannot be had.
        """
        config, tls = self.config, self.tls
        grpc_port = await self.server.start(tls.grpc_credentials() if tls else None)
        app = http_api.make_app(self.health, self.link, self.probe, self.metrics)
        context = tls.http_context() if tls and config.tls_http else None
        try:
            runner, http_port = await http_api.start(app, config.host, config.port, context)
        except StartupError:
            await self.server.stop(0)
            raise
        return grpc_port, http_port, runner

    def background(self, on_state: Callable[[State], None]) -> list[Awaitable[None]]:
        """What runs beside the servers, for ever."""
        watched: list[Watched[object]] = []
        if self.tls is not None:
            watched.append(self.tls.watched)  # type: ignore[arg-type]  # only refreshed
        if self.keys is not None:
            watched.append(self.keys)  # type: ignore[arg-type]
        return [
            self.link.run(),
            self.health.watch(on_state),
            self.doubt.settle(),
            self.server.writes.watch(),
            report_progress(self.link, self.metrics),
            *([keep_fresh(watched)] if watched else []),
        ]

    async def drain(self) -> None:
        """Let open requests end; those that do not in time get UNAVAILABLE."""
        self.health.draining = True
        self.server.health_changed()
        # A call that is on its way when gRPC shuts down is cancelled; clients that look at the
        # health, and load balancers, send theirs elsewhere from now on.
        await asyncio.sleep(_LAME_DUCK_SECONDS)
        log.info("draining %d open requests", len(self.streams))
        seconds = self.config.drain_timeout
        cut_off = asyncio.get_running_loop().call_later(seconds, self.streams.cut_off)
        await self.server.stop(seconds + _CUT_OFF_SECONDS)
        cut_off.cancel()
        if self.tracing is not None:
            await asyncio.to_thread(_bounded, self.tracing.close)


async def serve(channel: Channel[ToChild], boot: Boot) -> None:
    """Serve until drained."""
    front = Front(boot)
    grpc_port, http_port, runner = await front.listen()

    def on_state(state: State) -> None:
        log.info("state: %s", state.value)
        for other in State:
            front.metrics.set("tgi_health_state", float(other is state), state=other.value)
        front.server.health_changed()
        if state is State.READY and front.link.model is not None:
            channel.send(Serving(front.link.model, grpc_port, http_port))

    async with asyncio.TaskGroup() as group:
        work = [*front.background(on_state), _beat(channel)]
        tasks = [group.create_task(_forever(item)) for item in work]
        await _drain_asked(channel)
        await front.drain()
        await runner.cleanup()
        for task in tasks:
            task.cancel()


async def _forever(work: Awaitable[None]) -> None:
    await work


async def _beat(channel: Channel[ToChild]) -> None:
    while True:
        channel.send(Alive())
        await asyncio.sleep(_BEAT_SECONDS)


async def _drain_asked(channel: Channel[ToChild]) -> None:
    """Wait for `Drain`; exit at once if the supervisor is gone."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        messages = channel.receive()
        if messages is None:
            os._exit(1)
        if any(isinstance(message, Drain) for message in messages) and not asked.done():
            asked.set_result(None)

    loop.add_reader(channel.fileno(), read)
    await asked


def _bounded(work: Callable[[], None]) -> None:
    """Run something that may block for long, but wait for it only a little while."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_FLUSH_SECONDS)


def main() -> int:
    """Entry point."""
    channel, boot = open_child()
    logs.configure(boot.config.log_level, boot.config.log_format, "front")
    try:
        uvloop.run(serve(channel, boot))
    except StartupError as error:
        with contextlib.suppress(OSError):  # the supervisor may be gone
            channel.send(Fatal(str(error), error.exit_code))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
