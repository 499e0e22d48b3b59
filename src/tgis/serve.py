"""The supervisor: starts front and core, watches them, restarts the core, owns the exit code.

It knows neither torch nor gRPC. It sleeps until a child speaks or dies, a signal comes, or
somebody has been silent for too long.
"""

import contextlib
import logging
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tgis import __version__
from tgis.config import Config, effective_limits
from tgis.control import (
    LAST_WORDS_SECONDS,
    Alive,
    Boot,
    Channel,
    Drain,
    Fatal,
    Loaded,
    Serving,
    ToChild,
    ToSupervisor,
    adopt_orphans,
    ask_for_stacks,
    how_ended,
)
from tgis.errors import StartupError
from tgis.hub.draft import resolve_draft
from tgis.hub.fast_tokenizer import ensure_fast_tokenizer
from tgis.hub.headers import read_headers
from tgis.hub.resolve import resolve
from tgis.observe import logs, tracing

log = logging.getLogger("tgis.serve")

_TICK_SECONDS = 0.25
_EXIT_SECONDS = 5.0  # for a front that has drained: to send its last errors and traces
# Imports and files on a slow disk can hold a starting process's threads up for long.
_START_SILENCE_SECONDS = 120.0
# A core that dies this often without having loaded its model will not do better the next time.
_MAX_FAILED_LOADS = 3
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Child:
    """A started process, its channel, and what it said last."""

    def __init__(self, module: str, boot: Boot) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C is the supervisor's alone
            )
        self.module = module
        self.name = module.rpartition(".")[2].removesuffix("_main")
        self.channel: Channel[ToSupervisor] = Channel(ours, ToSupervisor)
        self.pid_fd = os.pidfd_open(self.process.pid)
        self.last_heard = time.monotonic()
        self.fatal: Fatal | None = None
        self.loaded = False
        self.started = False  # from here on silence means a hang
        self.kill_at = math.inf  # CLOCK_MONOTONIC; it has been found to hang
        self.tell(boot)

    def tell(self, message: ToChild) -> None:
        """Send, unless it is dead already: its exit is reported on its own."""
        try:
            self.channel.send(message)
        except OSError:
            log.debug("%s is gone: not told %s", self.name, type(message).__name__)

    def reap(self) -> int:
        """Make sure that it is gone, and what it has started; returns its return code."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-self.process.pid, 0)
        return int(self.process.returncode)

    def end(self) -> None:
        """Forget it."""
        self.reap()
        self.channel.sock.close()
        os.close(self.pid_fd)


class Supervisor:
    """Runs one server.

    Args:
        boot: what the children are told.
        modules: the children; all but the front are replaced when they die.
        on_serving: told whenever requests are answered from then on.
    """

    def __init__(
        self,
        boot: Boot,
        modules: Sequence[str] = ("tgis.front", "tgis.core"),
        on_serving: Callable[[Serving], None] = lambda _: None,
    ) -> None:
        self._boot = boot
        self._modules = modules
        self._on_serving = on_serving
        self._config = boot.config
        self._selector = selectors.DefaultSelector()
        self._children: dict[str, _Child] = {}
        self._failed_loads = 0
        self._exit_code: int | None = None
        self._drain_deadline: float | None = None
        self._served = False

    def run(self) -> int:
        """Serve until told to stop; returns the exit code.

        Raises:
            StartupError: a child reported that the server cannot run.
        """
        restore = self._catch_signals()
        adopt_orphans()
        try:
            for module in self._modules:
                self._start(module)
            while self._exit_code is None:
                for key, _ in self._selector.select(self._pause()):
                    handle: Callable[[], None] = key.data
                    handle()
                self._check_time()
            return self._exit_code
        finally:
            for child in tuple(self._children.values()):
                self._stop(child)
            restore()
            self._selector.close()

    def _start(self, module: str) -> None:
        child = _Child(module, self._boot)
        self._children[child.name] = child
        self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._listen(child))
        self._selector.register(child.pid_fd, selectors.EVENT_READ, lambda: self._bury(child))
        log.info("started %s (pid %d)", child.name, child.process.pid)

    def _stop(self, child: _Child) -> None:
        if self._children.pop(child.name, None) is None:
            return
        self._selector.unregister(child.pid_fd)
        if child.channel.fileno() in self._selector.get_map():
            self._selector.unregister(child.channel)
        child.end()

    def _listen(self, child: _Child) -> None:
        messages = child.channel.receive()
        if messages is None:  # its exit follows
            self._selector.unregister(child.channel)
            return
        child.last_heard = time.monotonic()
        for message in messages:
            match message:
                case Alive():
                    child.started = child.started or child.name == "front"
                case Loaded():
                    child.loaded = child.started = True
                    self._failed_loads = 0
                case Fatal():
                    child.fatal = message
                case Serving():
                    self._announce(message)
                    self._on_serving(message)

    def _announce(self, serving: Serving) -> None:
        model, host = serving.model, self._config.host
        log.info(
            "ready: %s (%s, %s) on gRPC %s:%d, HTTP %s:%d; sequences of up to %d tokens, "
            "%d tokens of keys and values in memory, %d sequences at once",
            self._boot.files.name,
            model.engine,
            model.dtype,
            host,
            serving.grpc_port,
            host,
            serving.http_port,
            model.max_sequence_length,
            model.kv_tokens,
            model.max_running,
        )
        if not self._served:
            self._served = True
            port = "" if serving.grpc_port == 8033 else f" --port {serving.grpc_port}"
            log.info('try: %s generate%s "Once upon a time"', _own_command(), port)

    def _bury(self, child: _Child) -> None:
        """A child has exited."""
        code = child.reap()
        if child.channel.fileno() in self._selector.get_map():
            self._listen(child)  # its last words
        self._stop(child)
        if child.name == "front" and self._drain_deadline is not None:
            self._exit_code = 0
        elif child.fatal is not None and not self._served:
            raise _startup_error(child.fatal)
        elif child.name == "front":
            raise StartupError(f"the front died ({how_ended(code)})")
        elif self._drain_deadline is None:
            self._replace(child, code)

    def _replace(self, child: _Child, code: int) -> None:
        cause = child.fatal.message if child.fatal else how_ended(code)
        if not child.loaded:
            self._failed_loads += 1
        if self._failed_loads >= _MAX_FAILED_LOADS:
            times = f"{self._failed_loads} times while loading"
            raise StartupError(f"the {child.name} died {times}: {cause}")
        log.error("the %s died (%s); starting another one", child.name, cause)
        self._start(child.module)

    def _check_time(self) -> None:
        now = time.monotonic()
        if self._drain_deadline is not None and now > self._drain_deadline:
            log.warning("open requests did not finish within --drain-timeout; giving up on them")
            self._exit_code = 0
        for child in tuple(self._children.values()):
            if now >= child.kill_at:
                child.kill_at, child.last_heard = math.inf, now
                child.process.kill()  # its exit is handled as any other
            elif now >= self._silent_until(child) and child.kill_at == math.inf:
                silence = now - child.last_heard
                log.error("the %s has been silent for %.1f s; killing it", child.name, silence)
                ask_for_stacks(child.process.pid)
                child.kill_at = now + LAST_WORDS_SECONDS

    def _silent_until(self, child: _Child) -> float:
        """When a child that says nothing more has hung for too long, last words included."""
        limit = self._config.hang_timeout if child.started else _START_SILENCE_SECONDS
        return child.last_heard + limit - LAST_WORDS_SECONDS

    def _pause(self) -> float:
        """Seconds until there is something to check."""
        now, children = time.monotonic(), self._children.values()
        times = [
            self._silent_until(child) if child.kill_at == math.inf else child.kill_at
            for child in children
        ]
        return max(0.0, min([_TICK_SECONDS, *(at - now for at in times)]))

    def _catch_signals(self) -> Callable[[], None]:
        """Turn signals into events of the selector; returns what undoes it."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        old_fd = signal.set_wakeup_fd(writer.fileno())
        old_handlers = [(number, signal.signal(number, lambda *_: None)) for number in _SIGNALS]
        self._selector.register(
            reader, selectors.EVENT_READ, lambda: self._on_signals(reader.recv(64))
        )

        def restore() -> None:
            for number, handler in old_handlers:
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)
            reader.close()
            writer.close()

        return restore

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number not in _SIGNALS:
                continue
            name = signal.Signals(number).name
            if self._drain_deadline is not None:
                log.warning("%s again: exiting at once", name)
                self._exit_code = 128 + number
            elif not self._served:
                log.info("%s: exiting; no request is open", name)
                self._exit_code = 0
            else:
                log.info("%s: finishing open requests, at most %g s", name, self._drain_seconds)
                self._drain_deadline = time.monotonic() + self._drain_seconds + _EXIT_SECONDS
                self._children["front"].tell(Drain())

    @property
    def _drain_seconds(self) -> float:
        return self._config.drain_timeout


def _startup_error(fatal: Fatal) -> StartupError:
    error = StartupError(fatal.message)
    error.exit_code = fatal.exit_code
    return error


def _own_command() -> str:
    """What a shell finds `tgis` by: its name, or its place beside this interpreter."""
    return "tgis" if shutil.which("tgis") else str(Path(sys.executable).with_name("tgis"))


def run(config: Config, on_serving: Callable[[Serving], None] = lambda _: None) -> int:
    """Serve one model; returns the exit code.

    Args:
        on_serving: told whenever requests are answered from then on.

    Raises:
        StartupError: the server cannot run; one line for the operator.
    """
    logs.configure(config.log_level, config.log_format, "serve")
    given = (f"{name}={getattr(config, name)}" for name in config.origins)
    log.info("tgis %s, Launcher args: %s", __version__, " ".join(given) or "none")
    tracing.check_available(config)
    files = resolve(config)
    for note in config.notes + effective_limits(config, files).notes:
        log.log(logging.WARNING if note.level == "warning" else logging.INFO, note.text)
    log.info("serving %s from %s", files.name, files.path)
    if files.weights[0].endswith(".safetensors"):
        read_headers(Path(files.path))  # what is broken is refused before torch is imported
    if config.rank > 0:  # the server is that of rank 0
        return Supervisor(Boot(config, files, "", ""), ["tgis.engines.rank_main"]).run()
    with tempfile.TemporaryDirectory(prefix="tgis-") as directory:
        tokenizer = ensure_fast_tokenizer(
            Path(files.path), Path(directory), config.trust_remote_code
        )
        draft = resolve_draft(config, tokenizer, Path(directory))
        boot = Boot(config, files, str(tokenizer), str(Path(directory) / "core.sock"), draft)
        return Supervisor(boot, on_serving=on_serving).run()
