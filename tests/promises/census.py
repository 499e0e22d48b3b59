"""What a server's processes still have on their hands, counted in the processes themselves.

`tests/kit/site` installs this in front and core. Each then listens on a Unix socket in the
directory that `DIRECTORY` names, and answers a connection with its numbers.
"""

import asyncio
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .figures import ROOT

DIRECTORY = "TGIS_TEST_CENSUS"
SITE = ROOT / "tests" / "kit" / "site"
_ROOMS = ("tgis.front", "tgis.core")

Numbers = dict[str, int]


@contextmanager
def counted() -> Iterator[dict[str, str]]:
    """The environment of a server whose processes can be asked; see `ask`."""
    with TemporaryDirectory(prefix="tgis-census-") as name:
        paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {
            "PYTHONPATH": os.pathsep.join(paths),
            "TGIS_TEST_FAULTS": "tests.promises.census",
            DIRECTORY: name,
        }


def ask(directory: str) -> Numbers:
    """The numbers of front and core."""
    numbers: Numbers = {}
    for room in _ROOMS:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(Path(directory) / room))
            numbers |= json.loads(sock.makefile().read())
    return numbers


def install() -> None:
    """In whatever process this is."""
    for room, count in zip(_ROOMS, (_front, _core), strict=True):
        if room in sys.orig_argv:
            listener = socket.socket(socket.AF_UNIX)
            path = Path(os.environ[DIRECTORY]) / room
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen()
            threading.Thread(target=_answer, args=(listener, count()), daemon=True).start()


def _answer(listener: socket.socket, count: Callable[[], Numbers]) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(json.dumps(count()).encode())


def _noted(kind: type) -> list[Any]:
    """The objects of a class, from now on."""
    made: list[Any] = []
    init = kind.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    kind.__init__ = noting  # type: ignore[misc]
    return made


def _front() -> Callable[[], Numbers]:
    from tgis.front import adapters, intake, link, streams, writes

    loops: list[asyncio.AbstractEventLoop] = []
    run = link.CoreLink.run

    async def noting(self: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await run(self)

    link.CoreLink.run = noting  # type: ignore[method-assign]
    all_streams, intakes = _noted(streams.Streams), _noted(intake.Intake)
    all_writes, all_adapters = _noted(writes.Writes), _noted(adapters.Adapters)

    def count() -> Numbers:
        return {
            "tasks": len(asyncio.all_tasks(loops[0])),
            "streams": len(all_streams[0]),
            "permits": intakes[0]._num_admitted,
            "tenants with permits": len(intakes[0]._held),
            "messages on their way": len(all_writes[0]._writing),
            "lookups": len(all_adapters[0]._lookups) + len(all_adapters[0]._waiting),
        }

    return count


def _core() -> Callable[[], Numbers]:
    from tgis.core import loop, scheduler

    cores, schedulers = _noted(loop.Core), _noted(scheduler.Scheduler)

    def count() -> Numbers:
        core, plan = cores[0], schedulers[0]
        return {
            "sequences": len(core._by_uid) + len(core._sequences),
            "states of the sampler": len(core._sampler._sequences),
            "waiting and running": plan.num_waiting + plan.num_running,
            "deadlines": len(plan._deadlines),
            "tokens in memory": plan._memory.used,
        }

    return count
