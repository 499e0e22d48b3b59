"""Every promise in its short form, its limits as wide as a busy machine needs (`Figure.slack`)."""

import os
import subprocess
import sys

import pytest
from tests.kit import audit

from .figures import ROOT

NAMES = [
    "core_killed",
    "core_stopped",
    "poisoned_request",
    "cancelled_streams",
    "slow_readers",
    "overload",
    "drain",
    "hostile_wire",
    "supply_chain",
    "soak",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_promise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(audit.SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", f"tests.promises.{name}", "--lenient"],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        print("", result.stdout, sep="\n")
    assert result.returncode == 0, result.stdout + result.stderr
