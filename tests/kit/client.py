"""A gRPC client for tests: requests and responses as proto3 JSON, errors as values."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

Json = dict[str, Any]

RPC_SECONDS = 60.0

REQUESTS: dict[str, type[Message]] = {
    "Generate": pb.BatchedGenerationRequest,
    "GenerateStream": pb.SingleGenerationRequest,
    "Tokenize": pb.BatchedTokenizeRequest,
    "ModelInfo": pb.ModelInfoRequest,
}


@dataclass(frozen=True)
class Status:
    """An RPC's error: the name of its code, and its details."""

    code: str
    message: str


def to_json(message: Message) -> Json:
    """proto3 JSON: fields with their default value are absent."""
    result: Json = MessageToDict(message)
    return result


def parse(method: str, request: Json) -> Message:
    """The request message of a method, from proto3 JSON."""
    return ParseDict(request, REQUESTS[method]())


def status_of(error: grpc.RpcError) -> Status:
    """The error of a finished call."""
    return Status(error.code().name, error.details() or "")


class AsyncClient:
    """Calls on one channel; any number at the same time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = pb_grpc.GenerationServiceStub(channel)

    async def call(self, method: str, request: Json) -> Json | Status:
        """A unary method."""
        try:
            message = parse(method, request)
            return to_json(await getattr(self._stub, method)(message, timeout=RPC_SECONDS))
        except grpc.RpcError as error:
            return status_of(error)

    async def stream(self, request: Json) -> tuple[list[Json], Status | None]:
        """GenerateStream: all messages, and the error that ended it if any."""
        messages: list[Json] = []
        try:
            message = parse("GenerateStream", request)
            async for response in self._stub.GenerateStream(message, timeout=RPC_SECONDS):
                messages.append(to_json(response))
        except grpc.RpcError as error:
            return messages, status_of(error)
        return messages, None


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[AsyncClient]:
    """A client of the server at `address`."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield AsyncClient(channel)


class Client:
    """The same, blocking."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = pb_grpc.GenerationServiceStub(channel)

    def call(self, method: str, request: Json) -> Json | Status:
        """A unary method."""
        try:
            message = parse(method, request)
            return to_json(getattr(self._stub, method)(message, timeout=RPC_SECONDS))
        except grpc.RpcError as error:
            return status_of(error)

    def stream(self, request: Json) -> tuple[list[Json], Status | None]:
        """GenerateStream: all messages, and the error that ended it if any."""
        messages: list[Json] = []
        try:
            message = parse("GenerateStream", request)
            for response in self._stub.GenerateStream(message, timeout=RPC_SECONDS):
                messages.append(to_json(response))
        except grpc.RpcError as error:
            return messages, status_of(error)
        return messages, None


@contextmanager
def connect_blocking(address: str) -> Iterator[Client]:
    """A blocking client of the server at `address`."""
    with grpc.insecure_channel(address) as channel:
        yield Client(channel)
