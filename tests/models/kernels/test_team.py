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


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    return done.stdout


SETUP = """
import os, torch
from tgis.models import kernels
torch.set_num_threads(3)
x = torch.randn(64, 4096)
y = kernels.act(x, "silu")
"""


def test_a_forked_process_has_helpers_of_its_own() -> None:
    code = """
child = os.fork()
if child == 0:
    before = len(os.listdir("/proc/self/task"))
    z, after = kernels.act(x, "silu"), len(os.listdir("/proc/self/task"))
    os._exit(0 if after == before + 2 and z.numpy().tobytes() == y.numpy().tobytes() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _run(SETUP + code) == "0\n"


def _cpu_ticks() -> dict[str, int]:
    """Of this process's threads."""
    ticks = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        ticks[task.name] = int(fields[11]) + int(fields[12])
    return ticks


def test_helpers_without_work_sleep(threads) -> None:
    threads(4)
    kernels.act(torch.ones(64, 4096), "silu")
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
