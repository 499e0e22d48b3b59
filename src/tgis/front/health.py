"""One state machine for every health check, whether over HTTP or gRPC.

Nothing here waits for the engine: the state follows from what the link has heard.
"""

import asyncio
import time
from collections.abc import Callable
from enum import Enum

from tgis.front.link import CoreLink

_POLL_SECONDS = 0.05


class State(Enum):
    """What the server is to its clients."""

    STARTING = "starting"  # the model is being loaded for the first time
    READY = "ready"
    DEGRADED = "degraded"  # the core is silent, or fails even on a test
    DEAD = "dead"  # the core has died and is being replaced
    DRAINING = "draining"  # no new requests; open ones finish


class Health:
    """The state, computed when asked for.

    Args:
        hang_timeout: seconds of silence after which the core counts as hung.

    Attributes:
        draining: the server has been told to end.
        failing: the engine fails on what it must be able to do.
    """

    def __init__(
        self, link: CoreLink, hang_timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._hang_timeout = hang_timeout
        self._clock = clock
        self._was_ready = False
        self.draining = False
        self.failing = False

    @property
    def is_ready(self) -> bool:
        """Whether requests will be answered."""
        return self.state is State.READY

    @property
    def state(self) -> State:
        """The state now."""
        if self.draining:
            return State.DRAINING
        if self._link.model is None:
            return State.DEAD if self._was_ready else State.STARTING
        self._was_ready = True
        if self.failing or self._clock() - self._link.last_heard > self._hang_timeout:
            return State.DEGRADED
        return State.READY

    async def watch(self, on_change: Callable[[State], None]) -> None:
        """Call `on_change` with the first state and with every other one; runs until cancelled."""
        last: State | None = None
        while True:
            changed = self._link.changed
            state = self.state
            if state is not last:
                last = state
                on_change(state)
            try:
                async with asyncio.timeout(_POLL_SECONDS):
                    await changed.wait()
            except TimeoutError:
                continue
