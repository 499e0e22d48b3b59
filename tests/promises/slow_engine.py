"""An engine as a plug-in: the native one, but long prompts take as long as they are told to.

What takes the time is real: a thread computes and holds no lock, as in any large prefill.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .figures import ROOT

NAME = "slow_native"
SECONDS = "SLOW_ENGINE_SECONDS"
LONG_PROMPT = 64  # tokens from which on a row takes its time

_ENTRY_POINTS = f"[tgis.engines]\n{NAME} = tests.promises.slow_engine:load\n"
_METADATA = "Metadata-Version: 2.1\nName: slow-engine\nVersion: 1\n"


@contextmanager
def plugged_in(seconds: float) -> Iterator[dict[str, str]]:
    """The environment in which a server finds the engine."""
    with TemporaryDirectory(prefix="tgis-plugin-") as name:
        info = Path(name) / "slow_engine-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(_METADATA)
        (info / "entry_points.txt").write_text(_ENTRY_POINTS)
        paths = [name, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {"PYTHONPATH": os.pathsep.join(paths), SECONDS: str(seconds)}


def load(*args: Any) -> Any:
    """See `tgis.engines.registry.Load`."""
    import torch

    from tgis.engines.registry import load_native

    engine = load_native(*args)
    seconds, forward = float(os.environ[SECONDS]), engine.forward
    square = torch.ones(2048, 2048)
    warm = False

    def slowly(plan: Any) -> Any:
        nonlocal warm
        if warm and any(len(row.token_ids) >= LONG_PROMPT for row in plan.rows):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                torch.mm(square, square)
        # The first plan is the server's own, which measures memory.
        warm = True
        return forward(plan)

    engine.forward = slowly
    return engine
