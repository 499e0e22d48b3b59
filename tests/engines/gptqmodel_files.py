"""Checkpoints made by GPTQModel, and read by it and Transformers, in an environment of its own.

The virtual environment is made once and kept in the user's cache directory; the variable
TGIS_GPTQMODEL_PYTHON names the interpreter of another.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engines.optimum_files import INSTALL_SECONDS, reason, run

BUILD = ("torch==2.13.0", "setuptools>=77", "wheel", "ninja")
LIBRARY = ("gptqmodel==7.6.0", "torch==2.13.0", "transformers>=5.10,<6", "optimum>=2.3,<3")
SECONDS = 600
# The library wants more cores than there may be.
MAKE = """
import os, sys
os.cpu_count = lambda: 8
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.backend import BACKEND
source, target, text, bits, group_size, desc_act, layout = sys.argv[1:]
awq = layout == "gemm"
config = QuantizeConfig(
    method="awq" if awq else "gptq", format=layout, bits=int(bits), group_size=int(group_size),
    desc_act=desc_act == "yes", device="cpu",
)
model = GPTQModel.load(source, config)
backend = BACKEND.AWQ_TORCH if awq else BACKEND.AUTO
model.quantize(open(text).read().split("\\n\\n"), batch_size=1, backend=backend)
model.save(target)
"""
READ = """
import json, os, sys
os.cpu_count = lambda: 8
import torch
from gptqmodel import GPTQModel
from gptqmodel.utils.backend import BACKEND
source, ids, target = sys.argv[1:]
model = GPTQModel.load(source, device="cpu", backend=BACKEND.TORCH).model
with torch.no_grad():
    logits = model(input_ids=torch.tensor([json.loads(ids)])).logits[0].float()
torch.save(logits, target)
"""
READ_BY_TRANSFORMERS = """
import json, os, sys
os.cpu_count = lambda: 8
import torch, transformers
source, ids, target = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.float32, device_map="cpu"
)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([json.loads(ids)])).logits[0].float()
torch.save(logits, target)
"""


def gptqmodel_python() -> Path:
    """The environment's interpreter; the test is skipped where pip cannot make it."""
    if given := os.environ.get("TGIS_GPTQMODEL_PYTHON"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = hashlib.sha256("\n".join((sys.version, *BUILD, *LIBRARY)).encode()).hexdigest()[:12]
    directory = cache / "tgis-tests" / f"gptqmodel-{mark}"
    python, ready = directory / "bin" / "python", directory / "ready"
    if ready.exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    try:
        run([sys.executable, "-m", "venv", "--clear", str(directory)], INSTALL_SECONDS)
        run([*pip, *BUILD], INSTALL_SECONDS)
        run([*pip, "--no-build-isolation", *LIBRARY], INSTALL_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"GPTQModel cannot be installed: {reason(error)}")
    ready.touch()
    return python


def quantise_with_gptqmodel(source: Path, target: Path, text: Path, *options: str) -> None:
    """Let GPTQModel make a checkpoint.

    Args:
        options: bits, group size, order of activation ("yes" or "no"), format; "gemm" is AWQ's.
    """
    words = [str(source), str(target), str(text), *options]
    run([str(gptqmodel_python()), "-c", MAKE, *words], SECONDS, target.parent)


def logits_of_gptqmodel(source: Path, ids: str, target: Path) -> None:
    """Let GPTQModel compute a checkpoint's logits for a JSON list of ids, and save them."""
    run(
        [str(gptqmodel_python()), "-c", READ, str(source), ids, str(target)], SECONDS, target.parent
    )


def logits_of_transformers(source: Path, ids: str, target: Path) -> None:
    """The same by Transformers, which asks GPTQModel for its layers."""
    command = [str(gptqmodel_python()), "-c", READ_BY_TRANSFORMERS, str(source), ids, str(target)]
    run(command, SECONDS, target.parent)
