"""How the processes that share a model find each other.

On one machine the leader starts the others and holds a socket pair to each. Ranks that were
started elsewhere (WORLD_SIZE and RANK, as torchrun sets them) connect to the leader at MASTER_ADDR,
one port above MASTER_PORT, which torchrun keeps for itself.
"""

import hashlib
import json
import logging
import socket
import time
from collections.abc import Collection
from contextlib import ExitStack
from datetime import timedelta

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tgis import __version__
from tgis.config import Config
from tgis.control import Channel, Fatal
from tgis.engines.rank_process import is_spread
from tgis.engines.rank_wire import Connect, Hello, ToLeader, ToRank, Welcome
from tgis.errors import ConfigError, StartupError
from tgis.models.dtypes import choose_dtype
from tgis.types import ModelFiles

log = logging.getLogger(__name__)

_STORE_SECONDS = 60.0
_HELLO_SECONDS = 5.0
_RETRY_SECONDS = 0.5
_REPORT_SECONDS = 30.0


def hello(config: Config, files: ModelFiles) -> Hello:
    """What this process is, for the others to compare."""
    digest = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode()).hexdigest()
    dtype = str(choose_dtype(config.dtype)[0]).removeprefix("torch.")
    return Hello(config.rank, config.num_shard, __version__, digest, dtype)


def listen(config: Config) -> socket.socket:
    """The leader's port for ranks that were started elsewhere.

    Raises:
        ConfigError: it cannot be had.
    """
    return _listen(config, config.master_port + 1)


def admit(server: socket.socket, own: Hello, hang_timeout: float) -> dict[int, Channel[ToLeader]]:
    """Wait until every other rank has joined; what does not belong is turned away."""
    ranks: dict[int, Channel[ToLeader]] = {}
    reported = 0.0
    server.settimeout(_REPORT_SECONDS)
    while missing := sorted(set(range(1, own.world_size)) - ranks.keys()):
        if time.monotonic() - reported > _REPORT_SECONDS:
            log.info("waiting for ranks %s at %s:%d", missing, *server.getsockname()[:2])
            reported = time.monotonic()
        try:
            sock, address = server.accept()
        except TimeoutError:
            continue
        channel: Channel[ToLeader] = Channel(sock, ToLeader)
        try:
            sock.settimeout(_HELLO_SECONDS)
            rank = _admit(channel, own, ranks.keys())
            sock.settimeout(None)
            _keep_alive(sock, hang_timeout)
        except (OSError, StartupError, msgspec.DecodeError) as error:
            log.warning("%s was not admitted: %s", address[0], error)
            sock.close()
            continue
        log.info("rank %d has joined from %s", rank, address[0])
        ranks[rank] = channel
    for channel in ranks.values():
        channel.send(Welcome())
    return ranks


def join(config: Config, own: Hello) -> Channel[ToRank]:
    """Connect to the leader, as often as it takes, and wait until all ranks have.

    Raises:
        StartupError: the leader does not want this rank.
    """
    address = (config.master_addr, config.master_port + 1)
    log.info("rank %d of %d joins %s:%d", own.rank, own.world_size, *address)
    while True:
        try:
            with ExitStack() as stack:
                sock = stack.enter_context(socket.create_connection(address, _HELLO_SECONDS))
                sock.settimeout(None)
                _keep_alive(sock, config.hang_timeout)
                channel: Channel[ToRank] = Channel(sock, ToRank)
                channel.send(own)
                if _is_welcome(channel):
                    stack.pop_all()
                    return channel
        except OSError as error:
            log.debug("the leader cannot be reached: %s", error)
        time.sleep(_RETRY_SECONDS)


def open_store(config: Config) -> tuple[TCPStore, Connect, str]:
    """Where all ranks leave the addresses of their collectives.

    MASTER_PORT is used where it was set and is not torchrun's; else any free port.

    Returns:
        The leader's end, what the other ranks are told, and the address of this machine.

    Raises:
        ConfigError: the port cannot be had.
    """
    asked = "master_port" in config.origins and not is_spread(config)
    with _listen(config, config.master_port if asked else 0) as server:
        host, port = server.getsockname()[:2]
        store = _store(host, port, listening=server.detach())
    return store, Connect(host, port), host


def meet(connect: Connect) -> tuple[TCPStore, str]:
    """The store that the leader has opened, and the address of this machine that leads there."""
    with socket.create_connection((connect.host, connect.port), _STORE_SECONDS) as probe:
        address: str = probe.getsockname()[0]
    return _store(connect.host, connect.port), address


def _store(host: str, port: int, listening: int | None = None) -> TCPStore:
    return TCPStore(
        host,
        port,
        is_master=listening is not None,
        timeout=timedelta(seconds=_STORE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def _listen(config: Config, port: int) -> socket.socket:
    name = config.master_addr
    try:
        family, *_, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR = {name}: the ranks cannot meet there at port {port}: {error.strerror}"
        ) from None


def _admit(channel: Channel[ToLeader], own: Hello, joined: Collection[int]) -> int:
    """Read who is there and compare.

    Raises:
        StartupError: not one of this group; it has been told so.
        OSError: it does not speak.
    """
    messages = channel.receive() or []
    if len(messages) != 1 or not isinstance(messages[0], Hello):
        raise StartupError("it is no rank")
    theirs = messages[0]
    fault = _fault(theirs, own, joined)
    if fault:
        channel.send(Fatal(f"rank {theirs.rank} cannot join the leader: {fault}", 1))
        raise StartupError(fault)
    return theirs.rank


def _fault(theirs: Hello, own: Hello, joined: Collection[int]) -> str | None:
    for field in ("world_size", "version", "model", "dtype"):
        if getattr(theirs, field) != getattr(own, field):
            what = "config.json of the model" if field == "model" else field
            return f"its {what} is {getattr(theirs, field)}, the leader's is {getattr(own, field)}"
    if not 0 < theirs.rank < own.world_size:
        return f"rank {theirs.rank} is not between 1 and {own.world_size - 1}"
    if theirs.rank in joined:
        return f"there is a rank {theirs.rank} already"
    return None


def _is_welcome(channel: Channel[ToRank]) -> bool:
    """Wait for the leader's answer; False if it is gone.

    Raises:
        StartupError: the leader does not want this rank.
    """
    while (messages := channel.receive()) is not None:
        for message in messages:
            if isinstance(message, Fatal):
                raise StartupError(message.message)
            if isinstance(message, Welcome):
                return True
    return False


def _keep_alive(sock: socket.socket, seconds: float) -> None:
    """Let the system notice when the other machine is gone."""
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, max(1, int(seconds / 2)))
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
