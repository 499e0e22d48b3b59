"""Our services at Ray Serve's gRPC proxy.

The proxy takes functions that add a service to a server, and puts its own routing in the place of
the methods. Ours hands requests through as bytes: the proxy neither parses nor builds messages.
What a request begins with stands in front of it, so that a router need not parse it again.
"""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tgis.cluster.affinity import MARK, key_of
from tgis.front.grpc_health import HEALTH_SERVICE
from tgis.front.grpc_server import GENERATION_SERVICE
from tgis.proto import generation_pb2 as pb

SERVICES = (GENERATION_SERVICE, HEALTH_SERVICE)
METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method for service in SERVICES for method in service.methods
}


def path_of(method: MethodDescriptor) -> str:
    """As it is called on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


def add_services(servicer: Any, server: grpc.Server) -> None:
    """Add every service; Serve replaces what the methods do, hence `servicer` is not asked."""
    for service in SERVICES:
        handlers = {method.name: _handler(method) for method in service.methods}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.full_name, handlers),)
        )


def _handler(method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )

    def behaviour(request: bytes, context: grpc.ServicerContext) -> Any:
        raise NotImplementedError(method.name)

    return make(behaviour, request_deserializer=_marked(GetMessageClass(method.input_type)))


def _marked(kind: type[Message]) -> Any:
    """A reader of requests: 16 bytes for the router, then the request as it came."""
    if kind not in (pb.BatchedGenerationRequest, pb.SingleGenerationRequest):
        return lambda data: MARK + bytes(8) + data

    def read(data: bytes) -> bytes:
        try:
            key = key_of(kind.FromString(data))
        except DecodeError:
            key = bytes(8)  # the replica will say so
        return MARK + key + data

    return read
