"""Steps of a real core, with a real front's work on what they produce, in one process.

Left out are only the socket between the two and gRPC itself.
"""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tgis.bench.parts import PARTS, Sums, Timed, clocked, inside_engine
from tgis.config import Config, effective_limits
from tgis.core.assembly import compile_engine
from tgis.core.loop import Core
from tgis.core.pool import make_pool
from tgis.core.scheduler import Scheduler
from tgis.core.sequence import decoder_only, encoder_decoder
from tgis.engines.registry import load_engine
from tgis.engines.threads import choose_threads
from tgis.errors import ConfigError
from tgis.front.streams import Job, Stream, Streams
from tgis.front.tokenize import TextTokenizer
from tgis.hub.fast_tokenizer import ensure_fast_tokenizer
from tgis.hub.resolve import resolve
from tgis.observe.metrics import Limits, Metrics
from tgis.proto import generation_pb2 as pb
from tgis.sampling import Sampler
from tgis.text.detokenize import Detokenizer
from tgis.types import NO_DETAILS, FinishReason, ModelFiles, ModelKind, SamplingParams
from tgis.wire import Abort, Add, Decoder, Gauges, Out, ToCore, ToFront, encode

log = logging.getLogger(__name__)

WARM_UP = 4  # steps before those that count
_CLIENT = 0


@dataclass
class Pulse:
    """What the loop tells a heartbeat."""

    step_started: float = 0.0
    gauges: Gauges = field(default_factory=Gauges)


class Link:
    """Both ends of the link between front and core, without a socket."""

    def __init__(self) -> None:
        self.to_core: list[ToCore] = []
        self.frames: list[bytes] = []

    def add(self, request: Add) -> None:
        """As the front's `CoreLink.add`."""
        self.to_core.append(request)

    def abort(self, seq_ids: list[int]) -> None:
        """As the front's `CoreLink.abort`."""
        self.to_core.append(Abort(seq_ids))

    def send(self, client: int, message: ToFront) -> None:
        """As the core's `FrontLink.send`."""
        self.frames.append(encode(message))

    def receive(self, wait: float) -> Iterator[tuple[int, ToCore]]:
        """As the core's `FrontLink.receive`."""
        messages, self.to_core = self.to_core, []
        return iter([(_CLIENT, message) for message in messages])


@dataclass(frozen=True)
class Result:
    """One batch."""

    rows: int
    context: int
    seconds: list[float]  # of each step in the core
    front: float  # the front's mean
    parts: dict[str, float] | None  # mean seconds

    @property
    def typical(self) -> float:
        """The median step."""
        return median(self.seconds)


class StepBench:
    """A model, and steps over batches of its sequences.

    Args:
        config: of the server; what it says of ports and the like does not matter.

    Raises:
        StartupError: the model cannot be served so.
    """

    def __init__(self, config: Config) -> None:
        files = resolve(config)
        threads, why = choose_threads(config.threads, files)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.limits = effective_limits(config, files)
        self._files = files
        engine = load_engine(config, files)
        self.about = f"{files.name} in {engine.caps.dtype}, {threads} threads ({why})"
        pool = make_pool(engine, config, self.limits.max_sequence_length)
        compile_engine(engine, config, pool, self.limits.max_sequence_length)
        self.max_rows = pool.max_running
        self._vocab_size = engine.caps.vocab_size
        self._sums = Sums(float)
        sampler = Sampler(self._vocab_size, files.eos_token_ids)
        scheduler = Scheduler(
            pool.memory,
            pool.budget,
            max_step_tokens=pool.max_step_tokens,
            max_mixed_tokens=config.max_mixed_tokens,
            mixed_step_tokens=pool.mixed_step_tokens,
            max_running=pool.max_running,
            eos_token_ids=files.eos_token_ids,
        )
        self._link = Link()
        self._frames: Decoder[ToFront] = Decoder(ToFront)

        def timed(part: str, target: object) -> Any:
            return Timed(target, part, self._sums)

        start = files.decoder_start_token_id or 0
        is_decoder = files.kind is ModelKind.DECODER_ONLY
        opening = decoder_only if is_decoder else encoder_decoder(start)
        self._core = Core(
            engine,
            timed("sampling", sampler),
            timed("scheduling", scheduler),
            timed("emit", self._link),
            Pulse(),
            opening=opening,
        )
        self._streams = _streams(config, files, self._link)

    async def run(self, rows: int, context: int, steps: int, profile: bool) -> Result:
        """Decode `rows` sequences that have `context` tokens at the first step that counts.

        Raises:
            ConfigError: the model's limits do not allow that.
        """
        num_new = WARM_UP + steps + rows + 2  # prompts may come in one after the other
        self._check(rows, context, num_new)
        with_prompts = max(1, context - WARM_UP)
        streams = [self._open(seed, with_prompts, num_new) for seed in range(rows)]
        readers = [asyncio.create_task(_read(stream)) for stream in streams]
        try:
            while not all(stream.num_generated for stream in streams):
                await self._turn()
            for _ in range(WARM_UP):
                await self._turn()
            self._sums.clear()
            if not profile:
                times = [await self._turn() for _ in range(steps)]
                return self._result(rows, context, times, None)
            inside = Sums(float)
            with inside_engine(inside, steps):
                times = [await self._turn() for _ in range(steps)]
            return self._result(rows, context, times, inside)
        finally:
            for reader in readers:
                reader.cancel()
            for stream in streams:
                self._streams.close(stream)
            self._core.turn(0.0)  # takes the aborts in

    def _check(self, rows: int, context: int, num_new: int) -> None:
        if rows > self.max_rows:
            raise ConfigError(f"--rows = {rows}: at most {self.max_rows} (max_batch_size)")
        longest = self.limits.max_sequence_length
        if context + num_new > longest:
            raise ConfigError(
                f"--context = {context}: with {num_new} new tokens of {rows} rows it must stay"
                f" below max_sequence_length ({longest})"
            )

    def _open(self, seed: int, length: int, num_new: int) -> Stream:
        rng = random.Random(seed)
        ids = [rng.randrange(self._vocab_size) for _ in range(length)]
        sampling = SamplingParams(min_new_tokens=num_new)
        now = time.monotonic()
        return self._streams.open(Job(ids, sampling, NO_DETAILS, num_new, False, (), False, now))

    async def _turn(self) -> float:
        """One step, and what the front makes of it; the step's seconds."""
        seconds = clocked(lambda: self._core.turn(0.0))
        start = time.perf_counter()
        frames, self._link.frames = self._link.frames, []
        for frame in frames:
            for message in self._frames.feed(frame):
                if isinstance(message, Out):
                    self._streams.on_out(message)
        await asyncio.sleep(0)
        self._sums["front"] += time.perf_counter() - start
        return seconds

    def _result(self, rows: int, context: int, times: list[float], inside: Sums | None) -> Result:
        steps = len(times)
        sums = Sums(float, {part: seconds / steps for part, seconds in self._sums.items()})
        if inside is None:
            return Result(rows, context, times, sums["front"], None)
        sums |= {part: seconds / steps for part, seconds in inside.items()}
        known = sum(sums[part] for part in PARTS if part not in ("python", "front"))
        sums["python"] = sum(times) / steps - known
        return Result(rows, context, times, sums["front"], {part: sums[part] for part in PARTS})


async def _read(stream: Stream) -> None:
    """What a streaming call does with its pieces."""
    while not stream.finished:
        for piece in await stream.next():
            message = pb.GenerationResponse(
                generated_token_count=piece.num_generated, text=piece.text
            )
            message.SerializeToString()
            if piece.finish is not FinishReason.NOT_FINISHED:
                return


def _streams(config: Config, files: ModelFiles, link: Link) -> Streams:
    path = ensure_fast_tokenizer(Path(files.path), None, config.trust_remote_code)
    bounds = effective_limits(config, files)
    tokenizer = TextTokenizer.load(
        path,
        workers=1,
        add_special_tokens=config.add_special_tokens,
        max_sequence_length=bounds.max_sequence_length,
    )
    detokenizer = Detokenizer(
        tokenizer.raw,
        files.kind,
        eos_token_ids=files.eos_token_ids,
        output_special_tokens=config.output_special_tokens,
    )
    limits = Limits(bounds.max_sequence_length, bounds.max_new_tokens, 128)
    streams = Streams(detokenizer, Metrics(limits))
    streams.link = link  # type: ignore[assignment]
    return streams


def run(config: Config, rows: list[int], contexts: list[int], steps: int, profile: bool) -> None:
    """Print a table: a line for each number of rows and each context.

    Raises:
        StartupError: the model cannot be served so.
    """
    bench = StepBench(config)
    print(bench.about)
    print(header(profile))
    for count, context in itertools.product(rows, contexts):
        print(line(asyncio.run(bench.run(count, context, steps, profile))), flush=True)


def header(profile: bool) -> str:
    """The head of the table, in Markdown; milliseconds."""
    names = ["rows", "context", "step p50", "p95", "tokens/s"]
    names += PARTS if profile else ["front"]
    return f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|"


def line(result: Result) -> str:
    """A line of the table; parts are means, with their share of the step."""
    slow = sorted(result.seconds)[int(0.95 * (len(result.seconds) - 1))]
    cells = [f"{result.rows}", f"{result.context}"]
    cells += [f"{result.typical * 1e3:.2f}", f"{slow * 1e3:.2f}"]
    cells.append(f"{result.rows / result.typical:,.0f}")
    mean = sum(result.seconds) / len(result.seconds)
    for seconds in (result.parts or {"front": result.front}).values():
        cells.append(f"{seconds * 1e3:.2f} ({seconds / mean:.0%})")
    return f"| {' | '.join(cells)} |"
