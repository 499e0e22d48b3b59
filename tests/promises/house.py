"""The server of the promises, what its processes hold, and requests to it."""

import asyncio
import http.client
import json
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.kit.processes import children, open_files
from tests.kit.server import Server, run_server

from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

from .figures import ONLY_SHOWN, ROOT, percentile

DEMO = ROOT / "src" / "tgis" / "demo" / "model"
TEXT = "Once upon a time there was a little girl"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
GENERATE_STREAM = "/fmaas.GenerationService/GenerateStream"


@contextmanager
def serving(*flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A ready server of the demo model that computes with one thread."""
    with run_server(DEMO, "--threads", "1", *flags, env=ONE_THREAD | (env or {})) as server:
        yield server


@contextmanager
def streaming(address: str) -> Iterator[pb_grpc.GenerationServiceStub]:
    """A connection of its own; used inside an event loop."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.insecure_channel(address, options)
    yield pb_grpc.GenerationServiceStub(channel)


def single(
    new_tokens: int = 20, text: str = TEXT, seed: int | None = None
) -> pb.SingleGenerationRequest:
    """A stream of exactly so many tokens, sampled if there is a seed."""
    params = pb.Parameters(
        stopping=pb.StoppingCriteria(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    )
    if seed is not None:
        params.method = pb.SAMPLE
        params.sampling.seed = seed
        params.sampling.temperature = 1.0
    return pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), params=params)


def batch(new_tokens: int = 20, text: str = TEXT) -> pb.BatchedGenerationRequest:
    """The same, not streamed."""
    request = single(new_tokens, text)
    return pb.BatchedGenerationRequest(requests=[request.request], params=request.params)


def apart(works: Sequence[Callable[[], Any]], nice: Sequence[int] = ()) -> list[Any]:
    """Run clients in processes of their own, all at the same time, and wait for them.

    A process that has used gRPC cannot fork; this one must not have.

    Args:
        works: each returns what JSON can say.
        nice: how far each stands back for everybody else.

    Raises:
        RuntimeError: one failed.
    """
    ends = [_fork(*pair) for pair in zip_longest(works, nice, fillvalue=0)]
    answers = []
    for child, reader in ends:
        with os.fdopen(reader, "rb") as file:
            answers.append(file.read())
        os.waitpid(child, 0)
    if not all(answers):
        raise RuntimeError("a client has failed")
    return [json.loads(answer) for answer in answers]


def _fork(work: Callable[[], Any], nice: int) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        os.nice(nice)
        answer = json.dumps(work()).encode()
        with os.fdopen(writer, "wb") as file:
            file.write(answer)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


@dataclass
class Ended:
    """How a stream ended."""

    at: float  # CLOCK_MONOTONIC
    code: grpc.StatusCode
    details: str = ""
    trailers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    num_tokens: int = 0


async def finish(call: grpc.aio.UnaryStreamCall) -> Ended:
    """Read a stream to its end."""
    text, num_tokens = "", 0
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            text += message.text
            num_tokens = message.generated_token_count or num_tokens
    except grpc.aio.AioRpcError as error:
        trailers = {key: str(value) for key, value in error.trailing_metadata() or ()}
        details = error.details() or ""
        return Ended(time.monotonic(), error.code(), details, trailers, text, num_tokens)
    except asyncio.CancelledError:
        return Ended(time.monotonic(), grpc.StatusCode.CANCELLED, "", {}, text, num_tokens)
    return Ended(time.monotonic(), await call.code(), "", {}, text, num_tokens)


LONGEST_STEP = 512  # tokens


async def compute_every_size(address: str) -> None:
    """Prompts of every length, so that steps of every size have been computed.

    The libraries behind a layer compile code for a size when they meet it, and keep it: one late
    newcomer is 2 MB, and would be taken for a leak.
    """
    rng = random.Random(0)
    with streaming(address) as stub:
        for length in range(1, LONGEST_STEP + 1):
            words = (rng.choice(["dog", "girl", "park", "tree", "ball"]) for _ in range(length))
            request = single(1, " ".join(words))
            request.params.truncate_input_tokens = length
            await finish(stub.GenerateStream(request))


async def begin(stub: pb_grpc.GenerationServiceStub, request: pb.SingleGenerationRequest):  # type: ignore[no-untyped-def]
    """A stream of which the first token has come."""
    call = stub.GenerateStream(request)
    while not (await call.read()).generated_token_count:
        pass
    return call


def gauge(server: Server, name: str) -> float:
    """The value of one sample of /metrics, such as `tgi_queue_size`."""
    _, text = server.get("/metrics")
    (value,) = (line.split()[-1] for line in text.splitlines() if line.startswith(name + " "))
    return float(value)


def wait_idle(server: Server, seconds: float = 30.0) -> None:
    """Wait until nothing is queued, running, or held in memory."""
    names = ("tgi_queue_size", "tgi_batch_current_size", "tgi_kv_cache_usage")
    deadline = time.monotonic() + seconds
    while any(gauge(server, name) for name in names):
        if time.monotonic() > deadline:
            raise TimeoutError("the server is not idle")
        time.sleep(0.05)


def settle(server: Server) -> None:
    """Until nothing is to be done, and the core has given the system back what it has freed."""
    wait_idle(server)
    time.sleep(2.5)


@dataclass(frozen=True)
class Holdings:
    """What processes hold."""

    files: int
    threads: int
    rss: int  # bytes
    shared: int  # entries of /dev/shm

    def growth(self, before: "Holdings") -> list[tuple[str, float, float]]:
        """What, by how many percent it has grown, and how far a test lets that go."""
        return [
            ("open files", _percent(self.files, before.files), 1.0),
            ("threads", _percent(self.threads, before.threads), 1.0),
            ("resident memory", _percent(self.rss, before.rss), 1.0),
            # All processes of a machine share it.
            ("names in /dev/shm", _percent(self.shared + 1, before.shared + 1), ONLY_SHOWN),
        ]


def _percent(after: float, before: float) -> float:
    return 100 * (after / before - 1)


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def cache_rss(pid: int) -> int:
    """Resident bytes of the keys and values: memory that is neither reserved nor in huge pages."""
    total = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if name == "Rss:":
            size = int(values[0]) * 1024
        elif name == "VmFlags:" and {"nr", "nh"} <= set(values):
            total += size
    return total


def holdings(*pids: int) -> Holdings:
    """What these processes hold together."""
    return Holdings(
        sum(open_files(pid) for pid in pids),
        sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids),
        sum(rss(pid) for pid in pids),
        len(list(Path("/dev/shm").iterdir())),
    )


def pid_of(server: Server, name: str) -> int:
    """`front` or `core`."""
    return children(server.process.pid)[f"tgis.{name}"]


class HealthWatch:
    """Asks /health again and again, from a thread."""

    def __init__(self, server: Server, pause: float = 0.01) -> None:
        self.looks: list[tuple[float, float, int]] = []  # when asked, seconds, status (0 = none)
        self._host, _, self._port = server.http.removeprefix("http://").rpartition(":")
        self._pause = pause
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "HealthWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def first(self, status: int, since: float) -> float:
        """When /health first gave this status after `since`; infinite if never."""
        return min((at + took for at, took, s in self.looks if s == status and at >= since),
                   default=float("inf"))  # fmt: skip

    def p99(self) -> float:
        """Seconds."""
        return percentile([took for _, took, _ in self.looks], 99)

    def _look(self) -> None:
        while not self._done.wait(self._pause):
            start = time.monotonic()
            connection = http.client.HTTPConnection(self._host, int(self._port), timeout=10)
            try:
                connection.request("GET", "/health")
                status = connection.getresponse().status
            except OSError:
                status = 0
            finally:
                connection.close()
            self.looks.append((start, time.monotonic() - start, status))


class HealthStream:
    """Listens to `grpc.health.v1.Health/Watch`, from a thread."""

    def __init__(self, server: Server) -> None:
        self.news: list[tuple[float, bool]] = []  # when, and whether it serves
        self._address = server.grpc

    def __enter__(self) -> "HealthStream":
        self._channel = grpc.insecure_channel(self._address)
        stub = health_pb2_grpc.HealthStub(self._channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest())
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()

    def first_bad(self, since: float) -> float:
        """When it first said NOT_SERVING after `since`; infinite if never."""
        return min((at for at, serves in self.news if at >= since and not serves),
                   default=float("inf"))  # fmt: skip

    def _listen(self) -> None:
        try:
            for message in self._call:
                serves = message.status == health_pb2.HealthCheckResponse.SERVING
                self.news.append((time.monotonic(), serves))
        except grpc.RpcError:  # cancelled above
            pass


def serves_again(server: Server, seconds: float = 60.0) -> float:
    """Wait until a request is answered; returns when (CLOCK_MONOTONIC)."""
    deadline = time.monotonic() + seconds
    with grpc.insecure_channel(server.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        while time.monotonic() < deadline:
            try:
                stub.Generate(batch(1), timeout=10)
                return time.monotonic()
            except grpc.RpcError:
                time.sleep(0.05)
    raise TimeoutError("the server does not serve again")
