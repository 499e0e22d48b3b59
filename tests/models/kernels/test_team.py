"""The threads that compute the kernels' loops together."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.models.kernels.test_replay import Network, inputs, needs_amx

from tgis.models import kernels
from tgis.models.kernels import build

try:
    build.find_or_compile()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@needs_amx
def test_threads_do_not_change_what_is_replayed(generator, threads) -> None:
    network = Network(generator)
    batch = inputs(9, generator)
    expected = network.step(batch[0].clone(), *batch[1:])
    threads(5)
    step = kernels.replayed(network.step)
    for _ in range(200):
        assert torch.equal(step(9, batch[0].clone(), *batch[1:]), expected)


def test_callers_of_different_threads_do_not_meet(generator, threads) -> None:
    threads(3)
    x = torch.randn((64, 4096), generator=generator)
    batches = [x * scale for scale in (1.0, 2.0, -3.0, 0.5)]
    expected = [kernels.act(batch, "gelu") for batch in batches]

    def compute(number: int) -> bool:
        torch.set_num_threads(3)  # counts for this thread
        return all(
            torch.equal(kernels.act(batches[number], "gelu"), expected[number]) for _ in range(300)
        )

    with ThreadPoolExecutor(len(batches)) as pool:
        assert all(pool.map(compute, range(len(batches))))


ROOT = Path(__file__).parents[3]


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=ROOT,
    )
    return done.stdout


SETUP = """
import os, torch
from tests.models.kernels.test_replay import Network, inputs
from tgis.models import kernels
torch.set_num_threads(3)
network, batch = Network(torch.Generator()), inputs(9, torch.Generator())
step = kernels.replayed(network.step)
def run():
    return step(9, batch[0].clone(), *batch[1:]).view(torch.int16).numpy().tobytes()
run()
before = len(os.listdir("/proc/self/task"))
said = run()
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_amx
def test_a_forked_process_has_helpers_of_its_own() -> None:
    code = """
child = os.fork()
if child == 0:
    before = len(os.listdir("/proc/self/task"))
    same = run() == said
    os._exit(0 if same and len(os.listdir("/proc/self/task")) == before + 2 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _run(SETUP + code).split() == ["2", "0"]


def _cpu_ticks() -> dict[str, int]:
    """Of this process's threads."""
    ticks = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        ticks[task.name] = int(fields[11]) + int(fields[12])
    return ticks


@needs_amx
def test_helpers_without_work_sleep(generator, threads) -> None:
    network, batch = Network(generator), inputs(9, generator)
    step = kernels.replayed(network.step)
    step(9, batch[0].clone(), *batch[1:])
    threads(4)
    step(9, batch[0].clone(), *batch[1:])
    helpers = [name for name in _cpu_ticks() if name != str(os.getpid())]
    assert len(helpers) >= 3
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until none has computed in half a second
        before = _cpu_ticks()
        time.sleep(0.5)
        after = _cpu_ticks()
        if all(after[name] == before[name] for name in helpers):
            return
    pytest.fail(f"helpers go on computing: {before} {after}")
