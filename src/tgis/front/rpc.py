"""How handlers of calls meet gRPC: requests are parsed and errors become statuses, all here.

A handler takes a parsed request and raises `RequestError`. It aborts a call itself only with a
code that none of our errors has.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tgis.errors import STATUS, InvalidRequest, RequestError, Status, Unavailable
from tgis.front.writes import Writes

log = logging.getLogger("tgis.front")

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[Any, Context], Any]  # a coroutine function, or an asynchronous generator

# A status travels in a header, percent-encoded: this keeps the worst case below 8 KiB.
_MAX_DETAILS_BYTES = 2000
# A longer identifier does not come back: above 8 KiB of metadata clients drop calls at random.
_MAX_ECHO_BYTES = 1024
_UNEXPECTED = "Request failed: internal error"

CORRELATION_ID = "x-correlation-id"  # metadata that comes back to the client with every answer
RETRY_AFTER = "retry-after-ms"  # metadata that comes with UNAVAILABLE


def metadata_of(context: Context) -> dict[str, str]:
    """The text entries of a call's metadata; of several with one name the first."""
    entries: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            entries.setdefault(name, value)
    return entries


def echoed(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What of a call's metadata comes back to its client."""
    identifier = metadata.get(CORRELATION_ID, "")
    if 0 < len(identifier) <= _MAX_ECHO_BYTES:
        return ((CORRELATION_ID, identifier),)
    return ()


def service_handler(
    service: ServiceDescriptor, servicer: object, writes: Writes
) -> "grpc.GenericRpcHandler[Any, Any]":
    """Serve every method of `service` by the method of `servicer` that has its name.

    Unary methods are coroutine functions `(request, context) -> response`. Those with a stream of
    responses are asynchronous generators, which are closed as soon as their client is gone.
    """
    handlers = {
        method.name: _method_handler(method, getattr(servicer, method.name), writes)
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _method_handler(
    method: MethodDescriptor, answer: Answer, writes: Writes
) -> "grpc.RpcMethodHandler[Any, Any]":
    make = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    wrap = _streaming if method.server_streaming else _unary
    return make(
        wrap(answer, writes),
        request_deserializer=_parser(GetMessageClass(method.input_type)),
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _parser(kind: type[Message]) -> Callable[[bytes], Message | InvalidRequest]:
    """Where gRPC would answer UNKNOWN and log a traceback, hand the error to the call instead."""

    def parse(data: bytes) -> Message | InvalidRequest:
        try:
            return kind.FromString(data)
        except DecodeError:
            return InvalidRequest(f"request is not a valid {kind.DESCRIPTOR.full_name} message")

    return parse


def _unary(answer: Answer, writes: Writes) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Message | InvalidRequest, context: Context) -> Any:
        async with _answering(request, context, writes):
            return await answer(request, context)

    return call


def _streaming(answer: Answer, writes: Writes) -> Callable[[Any, Context], Awaitable[None]]:
    async def call(request: Message | InvalidRequest, context: Context) -> None:
        async with (
            _answering(request, context, writes),
            aclosing(answer(request, context)) as messages,
        ):
            await writes.stream(context, messages)

    return call


@asynccontextmanager
async def _answering(
    request: Message | InvalidRequest, context: Context, writes: Writes
) -> AsyncIterator[None]:
    """The one place where errors become statuses. Cancellation passes through untouched."""
    try:
        if trailers := echoed(metadata_of(context)):
            context.set_trailing_metadata(trailers)
        if isinstance(request, InvalidRequest):
            raise request
        yield
        writes.leave(context)
    except grpc.aio.BaseError:
        raise  # gRPC's own: the call was aborted, its client is gone, the server has stopped
    except RequestError as error:
        writes.leave(context)
        await _abort(context, error)
    except Exception:
        log.exception("a request failed unexpectedly")
        writes.leave(context)
        await context.abort(grpc.StatusCode.UNKNOWN, _UNEXPECTED)


async def _abort(context: Context, error: RequestError) -> None:
    trailers = tuple(context.trailing_metadata() or ())
    if isinstance(error, Unavailable):
        trailers += ((RETRY_AFTER, str(error.retry_after_ms)),)
    await context.abort(grpc.StatusCode[_status(error).grpc], _clipped(str(error)), trailers)


def _status(error: RequestError) -> Status:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def _clipped(text: str) -> str:
    """Details may name what the client sent, which has no bound of its own."""
    body = text.encode(errors="replace")
    if len(body) <= _MAX_DETAILS_BYTES:
        return text
    return body[:_MAX_DETAILS_BYTES].decode(errors="ignore") + "..."
