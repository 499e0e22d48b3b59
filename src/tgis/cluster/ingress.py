"""Our services at Ray Serve's gRPC proxy.

The proxy takes functions that add a service to a server, and puts its own routing in the place of
the methods. Ours hands requests through as bytes: the proxy neither parses nor builds messages.
What a request begins with stands in front of it, so that a router need not parse it again. Around
Serve's routing, what a replica says about the end of a call becomes the call's status.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tgis.cluster.affinity import MARK, NO_KEY, key_of
from tgis.cluster.ending import Ending, decode
from tgis.errors import Unavailable
from tgis.front.grpc_health import HEALTH_SERVICE
from tgis.front.grpc_server import GENERATION_SERVICE
from tgis.front.rpc import RETRY_AFTER, Context, echoed, metadata_of
from tgis.proto import generation_pb2 as pb

SERVICES = (GENERATION_SERVICE, HEALTH_SERVICE)
METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method for service in SERVICES for method in service.methods
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
LOST = Unavailable("the replica that worked on the request is gone")


def path_of(method: MethodDescriptor) -> str:
    """As it is called on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


def add_services(servicer: Any, server: grpc.Server) -> None:
    """Add every service; Serve replaces what the methods do, hence `servicer` is not asked."""
    for service in SERVICES:
        server.add_generic_rpc_handlers((Methods(service),))


class Methods(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The methods of a service, of which Serve replaces `_method_handlers`."""

    def __init__(self, service: ServiceDescriptor) -> None:
        self._method_handlers = {path_of(method): _handler(method) for method in service.methods}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """What answers a call: Serve's routing, and the call's end from the replica."""
        handler: Any = self._method_handlers.get(details.method)
        if handler is None:
            return None
        if handler.response_streaming:
            return handler._replace(unary_stream=_streaming(handler.unary_stream))
        return handler._replace(unary_unary=_unary(handler.unary_unary))


def _handler(method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )

    def behaviour(request: bytes, context: grpc.ServicerContext) -> Any:
        raise NotImplementedError(method.name)

    return make(behaviour, request_deserializer=_marked(GetMessageClass(method.input_type)))


def _marked(kind: type[Message]) -> Callable[[bytes], bytes]:
    """A reader of requests: 16 bytes for the router, then the request as it came."""
    if kind not in (pb.BatchedGenerationRequest, pb.SingleGenerationRequest):
        return lambda data: MARK + NO_KEY + data

    def read(data: bytes) -> bytes:
        try:
            key = key_of(kind.FromString(data))
        except DecodeError:
            key = NO_KEY  # the replica will say so
        return MARK + key + data

    return read


def _unary(route: Callable[[bytes, Context], Awaitable[bytes]]) -> Any:
    async def call(request: bytes, context: Context) -> bytes:
        ending = decode(await route(request, context))
        _end(context, ending)
        return ending.message if ending else b""

    return call


def _streaming(route: Callable[[bytes, Context], AsyncIterator[bytes]]) -> Any:
    async def call(request: bytes, context: Context) -> AsyncIterator[bytes]:
        ending = None
        async for message in route(request, context):
            if (found := decode(message)) is None:
                yield message
            else:
                ending = found
        _end(context, ending)

    return call


def _end(context: Context, ending: Ending | None) -> None:
    """Set a call's status: what the server said, else what Serve did."""
    trailers = tuple(context.trailing_metadata() or ())  # Serve's own
    if ending is not None and not _was_cut_off(ending):
        context.set_code(_CODES[ending.code])
        context.set_details(ending.details)
        context.set_trailing_metadata((*trailers, *ending.trailers))
        return
    trailers += echoed(metadata_of(context))
    if ending is not None or _is_loss(context):
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(str(LOST))
        trailers += ((RETRY_AFTER, str(LOST.retry_after_ms)),)
    context.set_trailing_metadata(trailers)


def _was_cut_off(ending: Ending) -> bool:
    """Whether the server went away: when it is merely unable, it says when to come back."""
    unable = ending.code == grpc.StatusCode.UNAVAILABLE.value[0]
    return unable and RETRY_AFTER not in dict(ending.trailers)


def _is_loss(context: Any) -> bool:
    """Whether Serve lost the replica: what goes wrong in one comes with an ending."""
    lost = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK)
    code = context.code() or grpc.StatusCode.OK
    return _CODES.get(code, code) in lost
