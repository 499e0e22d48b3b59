"""The gRPC server: how it listens and ends, with health checks and reflection beside services."""

import asyncio
import errno
import resource
import socket
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection

from tgis.config import Config
from tgis.errors import ConfigError
from tgis.front.grpc_health import HEALTH_SERVICE, HealthService
from tgis.front.rpc import service_handler
from tgis.front.writes import Writes
from tgis.proto import generation_pb2

GENERATION_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]

# Names that health checks may ask for: the server as a whole, and its one service.
HEALTH_NAMES = ("", GENERATION_SERVICE.full_name)

_MAX_METADATA_BYTES = 16 * 1024
_OPTIONS = {
    # Two servers on one port would each get some of the calls.
    "grpc.so_reuseport": 0,
    "grpc.max_send_message_length": -1,
    # Above the first limit gRPC drops some calls at random, above the second all.
    "grpc.max_metadata_size": _MAX_METADATA_BYTES,
    "grpc.absolute_max_metadata_size": _MAX_METADATA_BYTES,
    # A client that has silently gone is found after 60 + 20 s, also while it has no call.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    # Clients may ping every 30 s; a few that come sooner are forgiven.
    "grpc.http2.min_ping_interval_without_data_ms": 30_000,
    "grpc.http2.max_ping_strikes": 2,
    # A connection that says nothing of HTTP/2, or has had no call for long, makes room.
    "grpc.server_handshake_timeout_ms": 20_000,
    "grpc.max_connection_idle_ms": 30 * 60_000,
    # Calls that Python has not taken yet. Above the first number gRPC cancels some of all clients
    # at random, and a client that resets its calls as fast as it can soon reaches its default.
    "grpc.server.max_pending_requests": 8_000,
    "grpc.server.max_pending_requests_hard_limit": 10_000,
}
_MOST_CONNECTIONS = 4096
_AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]

# Calls beside those that generate: tokenization, health checks, reflection.
_SPARE_CALLS = 1024
_SPARE_STREAMS = 100  # the same on one connection


class GrpcServer:
    """A server that is made, given its services, started, and stopped, each once.

    Args:
        config: address, message size and number of concurrent requests.
        is_serving: what health checks are told.
        interceptors: see every call of every service before it is answered.
    """

    def __init__(
        self,
        config: Config,
        is_serving: Callable[[], bool],
        interceptors: "Sequence[grpc.aio.ServerInterceptor[Any, Any]]" = (),
    ) -> None:
        self._config = config
        self._server = grpc.aio.server(
            options=[
                *_OPTIONS.items(),
                ("grpc.max_allowed_incoming_connections", _max_connections()),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                # All on one connection is as good as each on its own: too much is refused by name.
                # What a connection resets counts until Python has seen it, so more is no use.
                ("grpc.max_concurrent_streams", config.max_concurrent_requests + _SPARE_STREAMS),
            ],
            interceptors=list(interceptors),
            maximum_concurrent_rpcs=config.max_concurrent_requests + _SPARE_CALLS,
        )
        self.writes = Writes(config.write_timeout)
        self._stopping: asyncio.Future[None] | None = None
        self._health = HealthService(HEALTH_NAMES, is_serving)
        self.add_service(HEALTH_SERVICE, self._health)

    def add_service(self, service: ServiceDescriptor, servicer: object) -> None:
        """Serve `service` with the methods of `servicer`; see `tgis.front.rpc`."""
        self._server.add_generic_rpc_handlers([service_handler(service, servicer, self.writes)])

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen, with TLS if there are credentials, and return the port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        names = (
            GENERATION_SERVICE.full_name,
            HEALTH_SERVICE.full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)
        port = self._bind(credentials)
        await self._server.start()
        return port

    def health_changed(self) -> None:
        """Tell those who watch the health."""
        self._health.changed()

    async def stop(self, grace: float) -> None:
        """Take no new calls, let the open ones end within `grace` seconds, then close.

        Watchers of the health are told NOT_SERVING and hold nothing up.
        """
        self._health.close()
        if self._stopping is None:  # gRPC crashes when it is told twice at the same time
            self._stopping = asyncio.ensure_future(self._server.stop(grace))
        await asyncio.shield(self._stopping)

    def _bind(self, credentials: grpc.ServerCredentials | None) -> int:
        host, port = self._config.host, self._config.grpc_port
        _check_address(self._config)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise _cannot_listen(self._config, error) from error


def _max_connections() -> int:
    """So many that a quarter of the files that this process may open is left for all else."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MOST_CONNECTIONS, files * 3 // 4) if files > 0 else _MOST_CONNECTIONS


def _check_address(config: Config) -> None:
    """Bind for a moment: the operating system's errors say more than gRPC's.

    Raises:
        ConfigError: naming the setting and the reason.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.grpc_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise _cannot_listen(config, error) from error
    errors = [failed for address in found if (failed := _try_to_listen(address)) is not None]
    # A name may stand for addresses of which one kind is switched off; one is enough.
    taken = [failed for failed in errors if failed.errno == errno.EADDRINUSE]
    if taken or len(errors) == len(found):
        raise _cannot_listen(config, (taken or errors)[0])


def _try_to_listen(address: _AddressInfo) -> OSError | None:
    family, kind, protocol, _, bind_to = address
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(bind_to)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _cannot_listen(config: Config, error: Exception) -> ConfigError:
    setting = f"{config.origins.get('grpc_port', '--grpc-port')}={config.grpc_port}"
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError(
        f"{setting}: cannot listen on {config.host}, port {config.grpc_port}: {reason}"
    )
