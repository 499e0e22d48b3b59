"""The deep health check: one token really generated, past the permits and outside the metrics.

Checks that come while one is under way share it, so probes cannot pile up.
"""

import asyncio
import time
from enum import Enum

from tgis.errors import RequestError, Unavailable
from tgis.front.health import Health
from tgis.front.streams import Job, Streams
from tgis.front.tokenize import TextTokenizer
from tgis.types import DetailParams, SamplingParams

TIMEOUT_SECONDS = 60.0
_TEXT = "liveness"  # TGIS's own
_RETRY_SECONDS = 1.0


class Verdict(Enum):
    """How a check went."""

    WORKS = "works"
    FAILED = "failed"  # the engine failed on it
    UNAVAILABLE = "unavailable"  # there is no engine now
    TIMED_OUT = "timed out"


class Probe:
    """Generates a token when asked to.

    Args:
        timeout: seconds that one check may take; it waits for its turn like any request.
    """

    def __init__(
        self, streams: Streams, tokenizer: TextTokenizer, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        self._streams = streams
        self._tokenizer = tokenizer
        self._timeout = timeout
        self._under_way: asyncio.Task[Verdict] | None = None

    async def check(self) -> Verdict:
        """Wait for the result of the check under way, or of a new one."""
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.create_task(self._generate())
        return await asyncio.shield(self._under_way)

    async def _generate(self) -> Verdict:
        try:
            async with asyncio.timeout(self._timeout):
                encoding = await self._tokenizer.encode(_TEXT, 1)
                with self._streams.open(_job(encoding.ids)) as stream:
                    await stream.collect()
        except TimeoutError:
            return Verdict.TIMED_OUT
        except Unavailable:
            return Verdict.UNAVAILABLE
        except RequestError:
            return Verdict.FAILED
        return Verdict.WORKS


def _job(token_ids: list[int]) -> Job:
    return Job(
        token_ids=token_ids,
        sampling=SamplingParams(),
        details=DetailParams(),
        max_new_tokens=1,
        token_limited=False,
        stop_sequences=(),
        include_stop_sequence=False,
        arrival=time.monotonic(),
        measured=False,
    )


class Doubt:
    """Finds out, after a failed generation, whether the engine works at all.

    One request may fail by its own fault; only when a test generation fails too does the health
    become degraded, until one succeeds.
    """

    def __init__(self, probe: Probe, health: Health) -> None:
        self._probe = probe
        self._health = health
        self._raised = asyncio.Event()

    def rise(self) -> None:
        """A generation has failed."""
        self._raised.set()

    async def settle(self) -> None:
        """Check whenever there is doubt; runs until cancelled."""
        while True:
            await self._raised.wait()
            self._raised.clear()
            while (verdict := await self._probe.check()) is not Verdict.WORKS:
                self._health.failing = verdict is Verdict.FAILED or self._health.failing
                await asyncio.sleep(_RETRY_SECONDS)
            self._health.failing = False
