"""What the terminal commands ask of a server."""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tgis.cli.client import MAX_NEW_TOKENS, CallError, address_of
from tgis.proto import generation_pb2 as pb
from tgis.proto.generation_pb2_grpc import GenerationServiceStub

_SAMPLING = ("temperature", "top_k", "top_p", "typical_p", "seed")
_CONNECTION_CAUSE = re.compile(r"^failed to connect to all addresses; last error: \w+: \S+: ")
_INFO_TIMEOUT = 10.0  # seconds


class Reply:
    """The text of one answer, piece by piece; the other attributes are final when it is complete.

    Args:
        begin: makes the call; its result yields messages, and can be cancelled if it is a stream.
    """

    def __init__(self, begin: Callable[[], Any], address: str) -> None:
        self._begin = begin
        self._address = address
        self.num_input_tokens = 0
        self.num_tokens = 0
        self.stop_reason = ""
        self.seed = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        start = time.perf_counter()
        with failures_as_lines(self._address), _cancelled_at_exit(self._begin()) as messages:
            for message in messages:
                self.num_input_tokens = message.input_token_count or self.num_input_tokens
                self.num_tokens = message.generated_token_count or self.num_tokens
                self.stop_reason = pb.StopReason.Name(message.stop_reason)
                self.seed = message.seed or self.seed
                self.seconds = time.perf_counter() - start
                yield message.text


class Server:
    """A connection to a server."""

    def __init__(self, channel: grpc.Channel, address: str, api_key: str | None = None) -> None:
        self._address = address
        self._metadata = [] if api_key is None else [("x-api-key", api_key)]
        self._service = GenerationServiceStub(channel)  # type: ignore[no-untyped-call]

    @classmethod
    @contextmanager
    def connect(cls, args: argparse.Namespace) -> Iterator["Server"]:
        """Connect as `tgis.cli.client.add_connection` describes.

        Raises:
            CallError: a file that the options name cannot be read.
        """
        address, api_key = address_of(args), _read_key(args.api_key_file)
        with open_channel(address, args) as channel:
            yield cls(channel, address, api_key)

    def generate(
        self, text: str, args: argparse.Namespace, *, streaming: bool, forgetting: bool = False
    ) -> Reply:
        """Prepare to continue `text`, or what the model can hold of it if `forgetting`.

        Raises:
            CallError: no server, or arguments that cannot be sent.
        """
        params = self._parameters(args, forgetting)
        item = _checked(pb.GenerationRequest, text=text)
        if streaming:
            single = pb.SingleGenerationRequest(request=item, params=params)
            return Reply(
                lambda: self._service.GenerateStream(single, metadata=self._metadata),
                self._address,
            )
        batch = pb.BatchedGenerationRequest(requests=[item], params=params)
        return Reply(
            lambda: self._service.Generate(batch, metadata=self._metadata).responses, self._address
        )

    def _parameters(self, args: argparse.Namespace, forgetting: bool) -> pb.Parameters:
        with failures_as_lines(self._address):
            info = self._service.ModelInfo(
                pb.ModelInfoRequest(), timeout=_INFO_TIMEOUT, metadata=self._metadata
            )
        max_new_tokens = args.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = max(args.min_new_tokens, min(MAX_NEW_TOKENS, info.max_new_tokens))
        chosen = {name: getattr(args, name) for name in _SAMPLING}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return pb.Parameters(
            method=pb.SAMPLE if args.sample or chosen else pb.GREEDY,
            sampling=_checked(pb.SamplingParameters, **chosen),
            stopping=_checked(
                pb.StoppingCriteria,
                max_new_tokens=max_new_tokens,
                min_new_tokens=args.min_new_tokens,
                time_limit_millis=round(args.time_limit * 1000),
                stop_sequences=args.stop,
            ),
            decoding=_checked(pb.DecodingParameters, repetition_penalty=args.repetition_penalty),
            truncate_input_tokens=(
                max(1, info.max_sequence_length - max_new_tokens) if forgetting else 0
            ),
        )


def health(address: str, service: str, timeout: float, args: argparse.Namespace) -> str:
    """The name of a service's health status; `args` are those of `tgis.cli.client.add_tls`.

    Raises:
        CallError: no answer, or the server does not know the service.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    with open_channel(address, args) as channel, failures_as_lines(address):
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def open_channel(address: str, args: argparse.Namespace) -> grpc.Channel:
    """A channel with or without TLS, as `tgis.cli.client.add_tls` describes."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    if not (args.tls or args.tls_ca):
        return grpc.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(args.tls_ca),
        private_key=_read(args.tls_key),
        certificate_chain=_read(args.tls_cert),
    )
    return grpc.secure_channel(address, credentials, options)


@contextmanager
def failures_as_lines(address: str) -> Iterator[None]:
    """Turn the failure of a call into `CallError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise CallError(_line(error, address)) from error


def _line(error: grpc.RpcError, address: str) -> str:
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is not grpc.StatusCode.UNAVAILABLE or error.trailing_metadata():
        return f"{code.name}: {details}"
    cause = _CONNECTION_CAUSE.sub("", details)  # not the server's words but gRPC's
    hint = "; `tgis serve` starts a server" if "refused" in cause else ""
    return f"no answer from {address}: {cause}{hint}"


@contextmanager
def _cancelled_at_exit(messages: Any) -> Iterator[Any]:
    """The server must not go on when nobody reads any more; nothing happens to a complete call."""
    try:
        yield messages
    finally:
        if isinstance(messages, grpc.Call):
            messages.cancel()  # type: ignore[no-untyped-call]


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CallError(f"{path}: {error.strerror}") from error


def _read_key(path: str | None) -> str | None:
    if (content := _read(path)) is None:
        return None
    key = content.decode(errors="replace").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise CallError(f"{path}: not one line of printable ASCII characters")
    return key


def _checked(kind: type[Any], **fields: Any) -> Any:
    """A message, or a line that says which of our arguments does not fit into it."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise CallError(f"{kind.DESCRIPTOR.name}: {error}") from error
