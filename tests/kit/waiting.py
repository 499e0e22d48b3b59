"""Waiting inside an event loop for what no event tells."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something is true; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def turn_often() -> None:
    """Give whoever wants to run every chance to."""
    for _ in range(100):
        await asyncio.sleep(0)
