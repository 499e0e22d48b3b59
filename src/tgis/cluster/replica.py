"""A replica: an ordinary server of our own, and an actor that hands it what Serve's proxies bring.

Messages pass through as bytes. What the server says is what the client is told: messages, then
status and trailing metadata as an `Ending`; a client that is gone cancels the call.
"""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import aiohttp
import grpc
from google.protobuf.descriptor import MethodDescriptor
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tgis.cluster.affinity import MARK
from tgis.cluster.ending import Ending, encode
from tgis.cluster.exposition import merge
from tgis.cluster.ingress import METHODS, path_of
from tgis.cluster.ranks import Ranks
from tgis.config import Config
from tgis.hosted import HostedServer, loopback

log = logging.getLogger("ray.serve")

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
_METRICS_SECONDS = 5.0  # a replica that does not answer is left out
_HEADER_BYTES = len(MARK) + 8
# Headers that are the proxy's own business.
_NOT_RELAYED = ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding")


class Message(bytes):
    """A message as it goes over the wire; Serve wants messages that serialize themselves."""

    __slots__ = ()

    def SerializeToString(self) -> bytes:  # noqa: N802
        """Itself."""
        return bytes(self)


class Replica:
    """One replica; has a method for every method of the services, by its name.

    Args:
        config: the server's settings.
    """

    def __init__(self, config: Config) -> None:
        self._ranks = Ranks(config)
        self._server = HostedServer(loopback(self._ranks.leader), log=1)
        serving = self._server.wait()
        self._http = f"http://127.0.0.1:{serving.http_port}"
        self._address = f"127.0.0.1:{serving.grpc_port}"
        self._channel: grpc.aio.Channel | None = None
        self._session: aiohttp.ClientSession | None = None
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._all = serve.get_deployment_handle(context.deployment, context.app_name)
        log.info("replica %s: gRPC %s, HTTP %s", self._name, self._address, self._http)

    async def check_health(self) -> None:
        """Asked by Serve again and again.

        Raises:
            RuntimeError: this replica is to be replaced. A core that died is not a reason: the
                server replaces that by itself.
        """
        if ended := self._server.ended or await self._ranks.lost():
            raise RuntimeError(f"the server ended ({ended})")

    async def __call__(self, request: Request) -> Response:
        """HTTP, handed to the server; `/metrics` has those of all replicas."""
        if request.url.path == "/metrics" and request.method in ("GET", "HEAD"):
            answers = await self._all.broadcast("metrics").results_async(
                timeout_s=_METRICS_SECONDS, return_exceptions=True
            )
            text = merge({answer[0]: answer[1] for answer in answers if isinstance(answer, tuple)})
            return Response(text, media_type="text/plain; charset=utf-8")
        return await self._relay(request)

    async def metrics(self) -> tuple[str, str]:
        """The replica's name and its page of metrics."""
        async with self._client().get(self._http + "/metrics") as response:
            return self._name, await response.text()

    async def _relay(self, request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        answer = await self._client().request(
            request.method,
            self._http + request.url.path + query,
            data=await request.body(),
            headers={key: value for key, value in request.headers.items() if key != "host"},
            allow_redirects=False,
        )
        headers = {
            key: value for key, value in answer.headers.items() if key.lower() not in _NOT_RELAYED
        }

        async def body() -> AsyncIterator[bytes]:
            async with answer:
                async for piece in answer.content.iter_any():
                    yield piece

        return StreamingResponse(body(), answer.status, headers)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:  # needs the event loop
            self._session = aiohttp.ClientSession(
                auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)
            )
        return self._session

    def _calls(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, _OPTIONS)
        return self._channel

    async def _unary(self, path: str, request: bytes, context: RayServegRPCContext) -> Message:
        call = self._calls().unary_unary(path, None, None)(
            request[_HEADER_BYTES:], metadata=_forwarded(context)
        )
        try:
            answer = await call
        except grpc.aio.AioRpcError:
            answer = b""
        return await _ending(call, answer)

    async def _stream(
        self, path: str, request: bytes, context: RayServegRPCContext
    ) -> AsyncIterator[Message]:
        call = self._calls().unary_stream(path, None, None)(
            request[_HEADER_BYTES:], metadata=_forwarded(context)
        )
        try:
            with suppress(grpc.aio.AioRpcError):
                async for message in call:
                    yield Message(message)
            yield await _ending(call)
        finally:
            call.cancel()  # nothing happens if it has ended

    def __del__(self) -> None:
        """Serve calls this when the replica is to end; open requests have ended before."""
        with suppress(AttributeError):  # it never began
            self._server.stop()
            self._ranks.stop()


def _forwarded(context: RayServegRPCContext) -> tuple[tuple[str, Any], ...]:
    """What the client sent along, but for what belongs to its connection."""
    return tuple(
        (key, value)
        for key, value in context.invocation_metadata()
        if key != "user-agent" and not key.startswith(("grpc-", ":"))
    )


async def _ending(call: Any, answer: bytes = b"") -> Message:
    code, details = await call.code(), await call.details()
    metadata = await call.trailing_metadata() or ()
    trailers = [(key, value) for key, value in metadata if not key.startswith("grpc-")]
    return Message(encode(Ending(code.value[0], details or "", trailers, answer)))


def _unary_method(method: MethodDescriptor) -> Any:
    path = path_of(method)

    async def call(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> Message:
        return await self._unary(path, request, grpc_context)

    return call


def _streaming_method(method: MethodDescriptor) -> Any:
    path = path_of(method)

    async def call(
        self: Replica, request: bytes, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[Message]:
        async for message in self._stream(path, request, grpc_context):
            yield message

    return call


def _add_methods(methods: Mapping[str, MethodDescriptor]) -> None:
    for name, method in methods.items():
        make = _streaming_method if method.server_streaming else _unary_method
        function = make(method)
        function.__name__ = name
        setattr(Replica, name, function)


_add_methods(METHODS)
