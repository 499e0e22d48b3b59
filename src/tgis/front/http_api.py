"""HTTP for operators: `GET /health` and `GET /metrics`, and nothing else."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from tgis.errors import ConfigError
from tgis.front.health import Health, State
from tgis.front.link import CoreLink
from tgis.front.probe import Probe, Verdict
from tgis.observe.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1 << 16
_MAX_CONNECTIONS = 128
# For a request to come in whole, and for the next one on the same connection to come.
_REQUEST_SECONDS = 20.0  # also for an answer to be read
_REST = 9  # times what it took to make the metrics' text
_FALSE = ("0", "false", "no")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Exposition:
    """The metrics as text, which takes milliseconds of the event loop. It is made once for all who
    ask meanwhile, and for no more than a tenth of the time, however many ask.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._coming: asyncio.Task[bytes] | None = None
        self._rest_until = 0.0  # of the event loop's clock

    async def get(self) -> bytes:
        """As they are after the call, never before."""
        if self._coming is None:
            self._coming = asyncio.create_task(self._make())
        return await asyncio.shield(self._coming)

    async def _make(self) -> bytes:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._rest_until - clock()))
        self._coming = None
        start = clock()
        body = self._metrics.render()
        self._rest_until = clock() + _REST * (clock() - start)
        return body


def make_app(health: Health, link: CoreLink, probe: Probe, metrics: Metrics) -> web.Application:
    """The application; errors have empty bodies, as TGIS answers them."""

    async def get_health(request: web.Request) -> web.Response:
        state = health.state
        if state is not State.READY:
            return web.json_response(_unhealthy(state, link), status=503)
        if request.query.get("deep", "0") not in _FALSE:
            return _answer(await probe.check(), health, link)
        return web.Response()

    exposition = _Exposition(metrics)

    async def get_metrics(request: web.Request) -> web.Response:
        return web.Response(body=await exposition.get(), headers={"Content-Type": CONTENT_TYPE})

    @web.middleware
    async def in_time(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    @web.middleware
    async def empty_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPMethodNotAllowed as error:
            return web.Response(status=error.status, headers={"Allow": error.headers["Allow"]})
        except web.HTTPException as error:
            return web.Response(status=error.status)

    app = web.Application(middlewares=[in_time, empty_errors], client_max_size=_MAX_BODY_BYTES)
    app.router.add_get("/health", get_health)
    app.router.add_get("/metrics", get_metrics)
    return app


def _unhealthy(state: State, link: CoreLink) -> dict[str, object]:
    body: dict[str, object] = {"error": "unhealthy", "state": state.value}
    done, total = link.loading.bytes_done, link.loading.bytes_total
    if state in (State.STARTING, State.DEAD) and total:
        percent = round(100 * done / total, 1)
        body["loading"] = {"bytes": done, "total": total, "percent": percent}
    return body


def _answer(verdict: Verdict, health: Health, link: CoreLink) -> web.Response:
    """What a deep check says."""
    if verdict is Verdict.WORKS:
        return web.Response()
    body = _unhealthy(health.state, link) | {"check": verdict.value}
    if verdict is Verdict.TIMED_OUT:
        body["error"] = "Healthcheck timed-out"
    return web.json_response(body, status=503)


class _Door:
    """Makes what serves a new connection; when there are too many, the oldest one ends for it."""

    def __init__(self, server: web.Server) -> None:
        self._server = server

    def __call__(self) -> asyncio.Protocol:
        connections = self._server.connections
        if len(connections) >= _MAX_CONNECTIONS:
            connections[0].force_close()
        return self._server()


class _Site(web.BaseSite):
    """A port of the runner behind a `_Door`.

    Args:
        port: 0 for any free one.
    """

    def __init__(
        self, runner: web.AppRunner, host: str, port: int, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(runner, ssl_context=tls)
        self._host = host
        self._port = port

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen."""
        await super().start()
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_server(
            _Door(self._runner.server),
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            reuse_port=False,
        )


async def start(
    app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None
) -> tuple[web.AppRunner, int]:
    """Serve; returns the runner to clean up, and the port (which `port` 0 leaves to the system).

    Raises:
        ConfigError: the port is taken or may not be bound.
    """
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, keepalive_timeout=_REQUEST_SECONDS
    )
    await runner.setup()
    site = _Site(runner, host, port, tls)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"--port {port} (PORT): cannot listen on {host}: {error.strerror or error}"
        ) from error
    return runner, runner.addresses[0][1]
