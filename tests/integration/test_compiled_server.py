"""A real server under PT2_COMPILE: compiled at one start, found at the next, else done without."""

import asyncio
from pathlib import Path

import pytest
import torch
from tests.kit.client import Json, connect
from tests.kit.server import Server, run_server
from tests.kit.waiting import until

from tgis.engines.compilation import Compilations

REQUESTS: list[tuple[str, Json]] = [
    ("Once upon a time", {"stopping": {"maxNewTokens": 40}}),
    ("The", {"stopping": {"maxNewTokens": 9}}),
    ("One day a girl " * 20, {"stopping": {"maxNewTokens": 25}}),
    ("Tom and", {"stopping": {"maxNewTokens": 30}, "response": {"inputTokens": True}}),
    ("A bird", {"method": "SAMPLE", "sampling": {"seed": 7}, "stopping": {"maxNewTokens": 20}}),
]
FLAGS = (
    "--threads",
    "1",
    "--max-sequence-length",
    "192",
    "--max-step-tokens",
    "64",
    "--max-batch-size",
    "8",
)


async def answers(server: Server) -> list[object]:
    """What a mixed load gets: all at once, then one after the other."""
    async with connect(server.grpc) as client:
        calls = [{"requests": [{"text": text}], "params": params} for text, params in REQUESTS]
        together = await asyncio.gather(*(client.call("Generate", call) for call in calls))
        return [*together, *[await client.call("Generate", call) for call in calls]]


def metrics(server: Server) -> dict[str, float]:
    lines = server.get("/metrics")[1].splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("tgi_compile_"))
    return {name: float(value) for name, value in pairs}


async def served(
    model: Path, *flags: str, env: dict[str, str] | None = None
) -> tuple[list[object], dict[str, float], str]:
    with run_server(model, *FLAGS, *flags, env=env, ready_seconds=600) as server:
        found = await answers(server)
        if flags:  # these come with the front's next look at the core's state
            await until(lambda: metrics(server)["tgi_compile_warmup_seconds"])
        return found, metrics(server), server.log()


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_compiled_model_is_served(demo_model_dir: Path, tmp_path: Path) -> None:
    plain, values, log = await served(demo_model_dir)
    assert not any(values.values())
    assert "PT2_COMPILE" not in log
    on = ("--pt2-compile", "--pt2-compile-cache", str(tmp_path / "cache"))
    cold, values, log = await served(demo_model_dir, *on)
    assert cold == plain
    assert values['tgi_compile_count_total{when="startup"}'] == 1
    assert values['tgi_compile_count_total{when="serving"}'] == 0
    assert values["tgi_compile_active"] == 1
    assert "Warming up PyTorch 2 compile..." in log
    assert "compiled now; 17 steps gave what they give uncompiled" in log
    seconds = values["tgi_compile_warmup_seconds"]

    no_compiler = {"PATH": str(tmp_path)}
    warm, values, log = await served(demo_model_dir, *on, env=no_compiler)
    assert warm == plain
    assert values['tgi_compile_count_total{when="startup"}'] == 0
    assert values['tgi_compile_count_total{when="serving"}'] == 0
    assert values["tgi_compile_active"] == 1
    assert values["tgi_compile_warmup_seconds"] < seconds / 2

    elsewhere = (*on[:2], str(tmp_path / "other"))
    without, values, log = await served(demo_model_dir, *elsewhere, env=no_compiler)
    assert without == plain
    assert values["tgi_compile_active"] == 0
    assert [line for line in log.splitlines() if " WARN core: PT2_COMPILE: no C++" in line]
    assert log.count("the model is served uncompiled") == 1
    assert "no C++ compiler" in log


def test_recompilation_would_be_counted() -> None:
    """The counter that stays at 0 above is one that moves."""
    compilations = Compilations()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.zeros(3))
    assert compilations.drain() == 1
    compiled(torch.zeros(4))
    assert compilations.drain() == 1
    compiled(torch.zeros(4))
    assert compilations.drain() == 0
