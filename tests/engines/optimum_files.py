"""ONNX files made by Optimum itself, in an environment of its own.

Its ONNX package needs an older Transformers than ours, so it gets a virtual environment, which is
made once and kept in the user's cache directory.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "optimum==2.1.0",
    "optimum-onnx[onnxruntime]==0.1.0",
    "onnx>=1.20,<2",
    "onnxruntime>=1.22,<2",
)
INSTALL_SECONDS = 900
EXPORT_SECONDS = 300
SCRIPT = """
import sys
import torch
from optimum.exporters.onnx import main_export
torch.set_num_threads(1)
source, target, task, post_process = sys.argv[1:]
main_export(source, target, task=task, no_post_process=post_process == "no")
"""


def optimum_python() -> Path:
    """The environment's interpreter; the test is skipped where pip cannot make it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = hashlib.sha256("\n".join((sys.version, *REQUIREMENTS)).encode()).hexdigest()[:12]
    directory = cache / "tgis-tests" / f"optimum-{mark}"
    python, ready = directory / "bin" / "python", directory / "ready"
    if ready.exists():
        return python
    try:
        run([sys.executable, "-m", "venv", "--clear", str(directory)], INSTALL_SECONDS)
        run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], INSTALL_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"Optimum cannot be installed: {reason(error)}")
    ready.touch()
    return python


def export_with_optimum(source: Path, target: Path, task: str, *, merge: bool = True) -> None:
    """Let Optimum write a model's ONNX files.

    Args:
        task: Optimum's name of it, such as "text-generation".
        merge: whether two decoders become one where it has two.
    """
    words = [str(source), str(target), f"{task}-with-past", "yes" if merge else "no"]
    run([str(optimum_python()), "-c", SCRIPT, *words], EXPORT_SECONDS)


def run(command: list[str], seconds: int, directory: Path | None = None) -> None:
    """Run a command in a directory, for what it leaves where it runs."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=clean,
        cwd=directory,
    )


def reason(error: Exception) -> str:
    output = getattr(error, "stderr", None) or str(error)
    return str(output).strip().splitlines()[-1]
