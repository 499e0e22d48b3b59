"""How far the model has been read: a log line a second, and a metric."""

import asyncio
import logging
import time

from tgis.front.link import CoreLink
from tgis.observe.metrics import Metrics
from tgis.types import Compilation

log = logging.getLogger("tgis.front")

_SECONDS = 1.0
_MEGABYTE = 1e6


async def report_progress(link: CoreLink, metrics: Metrics) -> None:
    """Report while there is no model; runs until cancelled."""
    started = time.monotonic()
    while True:
        await asyncio.sleep(_SECONDS)
        if link.model is not None:
            metrics.set("tgi_model_load_ratio", 1.0)
            _note_compilation(metrics, link.model.compilation)
            await link.changed.wait()
            started = time.monotonic()
            continue
        done, total = link.loading.bytes_done, link.loading.bytes_total
        ratio = done / total if total else 0.0
        metrics.set("tgi_model_load_ratio", ratio)
        log.info("%s", _line(done, total, time.monotonic() - started))


def _note_compilation(metrics: Metrics, compilation: Compilation) -> None:
    """Of a core that has just become ready."""
    metrics.count("tgi_compile_count", compilation.num_compiled, when="startup")
    metrics.set("tgi_compile_active", compilation.active)
    metrics.set("tgi_compile_warmup_seconds", compilation.seconds)


def _line(done: int, total: int, seconds: float) -> str:
    if not total:
        return f"waiting for the core, {seconds:.0f} s"
    line = (
        f"loading the model: {100 * done / total:.0f} %, {done / _MEGABYTE:.0f} of "
        f"{total / _MEGABYTE:.0f} MB, {seconds:.0f} s"
    )
    left = seconds * (total - done) / done if done else 0.0
    return f"{line}, about {left:.0f} s left" if 0 < done < total else line
