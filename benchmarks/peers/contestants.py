"""Processes that run workloads: a peer's worker, or a tgis server."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tests.kit.server import start_server

import tgis
from benchmarks.load import Call, offered
from benchmarks.peers import install
from benchmarks.peers.figures import Figures

HERE = Path(__file__).parent
READY_SECONDS = 600
SLOT_TOKENS = 1280  # the longest prompt of the workloads and what follows it


class Contestant(Protocol):
    """One server or engine with a model loaded. Stopped processes use no CPU meanwhile."""

    version: str

    def run(self, calls: Sequence[Call]) -> Figures:
        """Offer all calls at once.

        Raises:
            RuntimeError: it failed.
        """

    def pause(self) -> None:
        """Let the others have the machine."""

    def close(self) -> None:
        """End it."""


def token_ids(call: Call) -> list[int]:
    """A prompt as ids, which every vocabulary of 32,000 has."""
    rng = random.Random(call.seed)
    return [rng.randrange(3, 4000) for _ in range(call.prompt_tokens)]


class Worker:
    """A peer in its own environment."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        environment = {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "WARNING"}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=HERE,
                env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        self.version = self._answer("READY")

    def run(self, calls: Sequence[Call]) -> Figures:
        """See `Contestant`."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        message = [(token_ids(call), call.new_tokens) for call in calls]
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._answer("RESULT"))
        return Figures.of(calls, answer["seconds"], answer["first"], answer["gaps"])

    def pause(self) -> None:
        """See `Contestant`."""
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """See `Contestant`."""
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self, word: str) -> str:
        """The rest of the line that begins with `word`; a peer's other output is passed over."""
        assert self._process.stdout is not None
        alarm = threading.Timer(READY_SECONDS, self._signal, [signal.SIGKILL])
        alarm.start()
        try:
            for line in self._process.stdout:
                if line.startswith(word):
                    return line[len(word) :].strip()
        finally:
            alarm.cancel()
        tail = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        self.close()
        raise RuntimeError(f"it ended: {' '.join(tail[-1:])[:300]}")


class Tgis:
    """Our server, through gRPC."""

    version = tgis.__version__

    def __init__(self, model: Path, flags: list[str]) -> None:
        self._directory = tempfile.TemporaryDirectory()
        directory = Path(self._directory.name)
        flags = ["--prefix-caching", "false", *flags]
        self._server = start_server(model, directory, *flags, dtype="bfloat16")
        self._server.wait_ready(READY_SECONDS)

    def run(self, calls: Sequence[Call]) -> Figures:
        """See `Contestant`."""
        result = offered(self._server.grpc, calls)
        first = [trace.first for trace in result.traces]
        gaps = [gap for trace in result.traces for gap in trace.gaps]
        return Figures.of(calls, result.seconds, first, gaps)

    def pause(self) -> None:
        """An idle server needs no pause, and would take it for a hang of its core."""

    def close(self) -> None:
        """See `Contestant`."""
        self._server.stop(30)
        self._directory.cleanup()


def start(peer: str, precision: str, model: Path, converted: Path, work: Path) -> Contestant:
    """Start one.

    Raises:
        RuntimeError: it does not start.
    """
    if peer == "tgis":
        quantize = ["--quantize", "int8-dynamic"] if precision == "int8" else []
        return Tgis(model, quantize)
    script = str(HERE / f"{peer.replace('.', '_')}_worker.py")
    command = [install.python(peer, work), script, str(converted), precision]
    if peer == "llama.cpp":
        slots = "32" if model.name.endswith("M") else "8"
        program = str(work / "llama-build" / "bin" / "llama-server")
        command = [sys.executable, script, program, str(converted / "model.gguf")]
        command += [slots, str(SLOT_TOKENS)]
        if precision == "int8":  # its repacked Q8_0 dies of SIGILL on the CPU of the figures
            command.append("--no-repack")
    return Worker(command, work / f"{model.name}-{peer}-{precision}.log")
