"""The front's process: everything that clients talk to."""

import asyncio
import logging
import os
import sys
from pathlib import Path

import uvloop

from tgis.config import effective_limits
from tgis.control import Alive, Boot, Channel, Drain, Fatal, Serving, ToChild, open_child
from tgis.errors import StartupError
from tgis.front import http_api
from tgis.front.accounts import Accounts
from tgis.front.grpc_api import GenerationService
from tgis.front.grpc_server import GENERATION_SERVICE, GrpcServer
from tgis.front.health import Health, State
from tgis.front.intake import Intake
from tgis.front.link import CoreLink
from tgis.front.params import Limits
from tgis.front.streams import Streams
from tgis.front.tokenize import TextTokenizer
from tgis.observe import logs, metrics
from tgis.text.detokenize import Detokenizer

log = logging.getLogger("tgis.front")

_BEAT_SECONDS = 0.5
_BATCH_BUCKETS = 128


async def serve(channel: Channel[ToChild], boot: Boot) -> None:
    """Serve until drained."""
    config, files = boot.config, boot.files
    bounds = effective_limits(config, files)
    limits = Limits(
        bounds.max_new_tokens, bounds.max_sequence_length, config.default_include_stop_seqs
    )
    registry = metrics.Metrics(
        metrics.Limits(
            bounds.max_sequence_length,
            bounds.max_new_tokens,
            config.max_batch_size or _BATCH_BUCKETS,
        )
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
    streams = Streams(detokenizer, registry)
    link = CoreLink(Path(boot.socket_path), streams)
    streams.link = link
    health = Health(link, config.hang_timeout)
    intake = Intake(tokenizer, limits, config.max_concurrent_requests, registry)
    service = GenerationService(
        intake, streams, tokenizer, Accounts(registry), files.kind, limits
    )
    server = GrpcServer(config)
    server.add_service(GENERATION_SERVICE, service)
    grpc_port = await server.start()
    try:
        app = http_api.make_app(health, link, registry)
        runner, http_port = await http_api.start(app, config.host, config.port)
    except StartupError:
        await server.stop(0)
        raise

    def on_state(state: State) -> None:
        log.info("state: %s", state.value)
        server.set_serving(state is State.READY)
        if state is State.READY and link.model is not None:
            channel.send(Serving(link.model, grpc_port, http_port))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(link.run()), group.create_task(health.watch(on_state))]
        tasks.append(group.create_task(_beat(channel)))
        await _drain_asked(channel)
        log.info("draining %d open requests", len(streams))
        health.draining = True
        server.set_serving(False)
        await server.stop(config.drain_timeout)
        await runner.cleanup()
        for task in tasks:
            task.cancel()


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


def main() -> int:
    """Entry point."""
    channel, boot = open_child()
    logs.configure(boot.config.log_level, boot.config.log_format, "front")
    try:
        uvloop.run(serve(channel, boot))
    except StartupError as error:
        channel.send(Fatal(str(error), error.exit_code))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
