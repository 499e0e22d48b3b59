"""`tgis serve --ray`: the application on a cluster, until told to stop."""

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray
from ray import serve

from tgis.cluster.app import NAME, application
from tgis.cluster.options import RayOptions
from tgis.config import Config
from tgis.config.fields import flag_of
from tgis.errors import ConfigError, StartupError
from tgis.hub.resolve import resolve
from tgis.observe import logs

log = logging.getLogger("tgis.cluster")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SERVICERS = "tgis.cluster.ingress:add_services"
_OBJECT_STORE_BYTES = 100 << 20  # of a cluster of our own; messages are small


def connect(options: RayOptions) -> None:
    """Join the cluster, or start one on this machine.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if options.address is None:
        ray.init(
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
        )
        return
    try:
        ray.init(address=options.address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"--ray-address={options.address}: {text[:300]}") from None


def run(config: Config, options: RayOptions) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Raises:
        StartupError: the application cannot start.
    """
    logs.configure(config.log_level, config.log_format, "ray")
    app = application(config, options)
    resolve(config)  # what is not there is not there on the other nodes either
    if options.address is None:
        _check_ports(config)
    with _signals() as told:
        try:
            connect(options)
            told.install()  # Ray has put handlers of its own in the place of ours
            _deploy(config, app)
            told.wait()
            serve.shutdown()
        except _Told:
            pass
        finally:
            ray.shutdown()
    return 0


def _check_ports(config: Config) -> None:
    """Bind for a moment: Serve would try again and again without a word.

    Raises:
        ConfigError: a port is taken, or is to be chosen by the system.
    """
    for name, host in (("port", config.host), ("grpc_port", "0.0.0.0")):
        port = getattr(config, name)
        where = f"{config.origins.get(name, flag_of(name))}={port}"
        if port == 0:
            raise ConfigError(f"{where}: clients could not find it; expected a port from 1")
        try:
            socket.create_server((host, port)).close()
        except OSError as error:
            raise ConfigError(f"{where}: cannot listen on {host}: {error.strerror}") from None


def _deploy(config: Config, app: serve.Application) -> None:
    log.info("deploying on Ray %s", ray.__version__)
    try:
        serve.start(
            http_options={"host": config.host, "port": config.port},
            grpc_options={"port": config.grpc_port, "grpc_servicer_functions": [SERVICERS]},
        )
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise StartupError(f"cannot serve: {_cause(error)}") from None
    log.info("ready on gRPC port %d, HTTP port %d", config.grpc_port, config.port)


def _cause(error: RuntimeError) -> str:
    """Why no replica could start, on one line; the replicas' status says more than the error."""
    found = serve.status().applications.get(NAME)
    messages = [deployment.message for deployment in found.deployments.values()] if found else []
    lines = "\n".join([str(error), *messages]).splitlines()
    causes = [line.strip() for line in lines if "StartupError: " in line or "ConfigError: " in line]
    return (causes or [" ".join(str(error).split())])[-1][:500]


@contextmanager
def _signals() -> Iterator["_Wait"]:
    """Signals end what is under way until all is deployed, and set an event from then on."""
    wait = _Wait()
    old = [(number, signal.getsignal(number)) for number in _SIGNALS]
    wait.install()
    try:
        yield wait
    finally:
        for number, handler in old:
            signal.signal(number, handler)


class _Told(BaseException):
    """A signal came before all was deployed."""


class _Wait:
    """Waiting for a signal."""

    def __init__(self) -> None:
        self._deployed = False
        self._event = threading.Event()

    def install(self) -> None:
        """Take the signals."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        log.info("%s: ending", signal.Signals(number).name)
        self._event.set()
        if not self._deployed:
            raise _Told

    def wait(self) -> None:
        """Wait for the first signal."""
        self._deployed = True
        self._event.wait()
