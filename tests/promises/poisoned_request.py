"""Promise 3: a poisoned request fails alone, and so does what a lack of memory strikes."""

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import grpc
import torch
from tests.kit.core_house import Front, House, open_house

from tgis.config import Config
from tgis.engines.base import CacheShape, Engine
from tgis.engines.registry import load_native
from tgis.hub.resolve import resolve
from tgis.proto import generation_pb2 as pb
from tgis.types import DetailParams, SamplingParams
from tgis.wire import Add, FailureKind

from . import faults
from .figures import ROOT, Figure, Promise
from .house import (
    DEMO,
    Ended,
    finish,
    gauge,
    pid_of,
    rss,
    serving,
    single,
    streaming,
    wait_idle,
)

FAILURES = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
MATES = 63
NEW_TOKENS = 40
SITE = ROOT / "tests" / "kit" / "site"


def poisoned(kind: str) -> pb.SingleGenerationRequest:
    """The request that strikes one part of the server."""
    request = single(NEW_TOKENS, "a text of nobody else " * 5, 5)
    match kind:
        case "tokenizer":
            request.request.text = faults.TOKENIZER
        case "sampler":
            request.params.sampling.seed = faults.SAMPLER
        case "detokenizer":
            request.params.sampling.seed = faults.DETOKENIZER
        case "adapter":
            request.prefix_id = faults.ADAPTER
        case "engine":
            request.params.truncate_input_tokens = faults.ENGINE
    return request


def mate(number: int) -> pb.SingleGenerationRequest:
    """One of those that must not notice: greedy, or sampled with a seed of its own."""
    return single(NEW_TOKENS, f"Once upon a time there were {number} dogs", number or None)


async def together(address: str, poison: pb.SingleGenerationRequest | None) -> list[Ended]:
    """All at once; the poisoned one comes first."""
    requests = [*([poison] if poison else []), *map(mate, range(MATES))]
    with streaming(address) as stub:
        return await asyncio.gather(*(finish(stub.GenerateStream(item)) for item in requests))


def requests(full: bool) -> list[Figure]:
    """Each fault in a batch of 64."""
    figures = []
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="tgis-store-") as store:
        env = {
            "PYTHONPATH": os.pathsep.join(paths),
            "TGIS_TEST_FAULTS": "tests.promises.faults",
            "PREFIX_STORE_PATH": store,
        }
        with serving("--max-batch-size", "64", env=env) as server:
            core = pid_of(server, "core")
            right = [ended.text for ended in asyncio.run(together(server.grpc, None))]
            for kind in ("tokenizer", "sampler", "detokenizer", "adapter", "engine"):
                victim, *mates = asyncio.run(together(server.grpc, poisoned(kind)))
                failed = victim.code in FAILURES
                changed = sum(m.text != text for m, text in zip(mates, right, strict=True))
                figures += [
                    Figure(f"{kind} fails: poisoned requests that fail", failed, 1, least=True),
                    Figure(f"... mates of {MATES} that fail or change", changed, 0),
                ]
            wait_idle(server)
            figures.append(Figure("sequences left", gauge(server, "tgi_batch_current_size"), 0))
            figures.append(Figure("cores lost", core != pid_of(server, "core"), 0))
    return figures


SLOTS, TOKENS = 8, 4000
KINDS: list[tuple[list[int], SamplingParams, DetailParams]] = [
    ([5, 9, 11, 40], SamplingParams(), DetailParams()),
    (list(range(20, 60)), SamplingParams(True, 0.9, 40, 0.9, seed=3), DetailParams()),
    (list(range(30, 90)), SamplingParams(True, 1.0, seed=4, repetition_penalty=1.2),
     DetailParams(True, True, 3, True, False)),
    (list(range(50, 120)), SamplingParams(min_new_tokens=5),
     DetailParams(True, True, 2, True, True)),
    ([7], SamplingParams(True, 1.0, typical_p=0.8, seed=9), DetailParams()),
    (list(range(200, 230)), SamplingParams(length_penalty_start=2, length_penalty_decay=1.1),
     DetailParams()),
]  # fmt: skip


def native_engine() -> Engine:
    """The demo model, for a core in this process."""
    config = Config(model_name=str(DEMO), threads=1)
    torch.set_num_threads(1)
    engine = load_native(config, resolve(config), torch.float32, None)
    engine.allocate(CacheShape(2 * SLOTS, 512))
    return engine


Hook = Callable[[int], None]


def run(engine: Engine, before_turn: Hook = lambda _: None) -> tuple[Front, House, int]:
    """All kinds of sequences in one batch; returns their answers and how many turns it took."""
    with (
        tempfile.TemporaryDirectory() as name,
        torch.no_grad(),
        open_house(Path(name), SLOTS, TOKENS, 64, engine=engine, caching=False) as house,
    ):
        front = house.connect()
        for number, (prompt, sampling, details) in enumerate(KINDS):
            front.send(Add(number, prompt, sampling, details, 10, float("inf"), 0.0))
        house.turn()
        turns = 0
        while turns == 0 or house.scheduler.has_work:
            before_turn(turns)
            house.turn()
            turns += 1
        front.read()
        return front, house, turns


# These only look something up.
_ALLOCATE_NOTHING = ("Row.num_tokens", "Sampler.remove")


def watched(frame: FrameType) -> bool:
    """Whether a function is one of those that make tensors and arrays."""
    if frame.f_code.co_qualname in _ALLOCATE_NOTHING:
        return False
    parts = Path(frame.f_code.co_filename).parts
    rooms = ("engines", "models", "sampling", "quant")
    return "tgis" in parts and any(room in parts for room in rooms)


def allocation_points(engine: Engine) -> list[tuple[CodeType, int]]:
    """Every function of engine, model and sampler that steps call, and a turn in which they do."""
    points: dict[CodeType, int] = {}
    now = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and watched(frame):
            points.setdefault(frame.f_code, now)

    def before(turn: int) -> None:
        nonlocal now
        now = turn
        sys.setprofile(note)

    try:
        run(engine, before)
    finally:
        sys.setprofile(None)
    return list(points.items())


def strike(code: CodeType, at_turn: int) -> Hook:
    """Raise MemoryError where a function is entered, once, in a certain turn."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is code:
            raise MemoryError  # which also ends the tracing
        return None

    def before(turn: int) -> None:
        sys.settrace(trace if turn == at_turn else None)

    return before


def memory(full: bool) -> list[Figure]:
    """Out of memory at each point, in a core of this process: what fails, and what does not."""
    engine = native_engine()
    reference, _, _ = run(engine)
    points = allocation_points(engine)
    if not full:
        points = points[::4]
    half, memory = len(points) // 2, 0
    died = failed = wrong_kind = changed = left = 0
    for number, (code, turn) in enumerate(points):
        if number == half:
            memory = rss(os.getpid())
        try:
            front, house, _ = run(engine, strike(code, turn))
        except Exception:
            died += 1
            continue
        finally:
            sys.settrace(None)
        failed += len(front.failed)
        wrong_kind += sum(f.kind is not FailureKind.OUT_OF_MEMORY for f in front.failed.values())
        changed += sum(
            front.tokens.get(number) != reference.tokens[number]
            for number in range(len(KINDS))
            if number not in front.failed
        )
        left += house.memory.used + len(house.core._by_uid) + len(house.core._sampler._sequences)
    return [
        Figure("functions in which memory ran out, one run each", len(points), None),
        Figure("... cores that died of it", died, 0),
        Figure(f"... sequences of {len(points) * len(KINDS)} that failed", failed, None),
        Figure("... failures that do not say so", wrong_kind, 0),
        Figure("... other sequences whose tokens changed", changed, 0),
        Figure("... tokens, sequences and states left in memory", left, 0),
        Figure("... growth of the process in the second half of them",
               (rss(os.getpid()) - memory) / 2**20, 8, " MB"),
    ]  # fmt: skip


def measure(full: bool) -> list[Figure]:
    """See the module."""
    figures = requests(full)
    logging.disable(logging.CRITICAL)  # a traceback for each of the failures to come
    try:
        return [*figures, *memory(full)]
    finally:
        logging.disable(logging.NOTSET)


PROMISE = Promise("poisoned_request", "one poisoned request; out of memory everywhere", measure)

if __name__ == "__main__":
    PROMISE.main()
