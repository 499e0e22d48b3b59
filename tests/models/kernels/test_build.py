"""Finding and compiling the library, and doing without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tgis.models.kernels import build


def test_a_library_is_compiled_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "none")
    path = build.find_or_compile(tmp_path / "cache")
    assert path.parent == tmp_path / "cache"
    assert [path.name] == [file.name for file in path.parent.iterdir()]
    monkeypatch.setattr(shutil, "which", lambda _: None)  # no compiler is needed any more
    assert build.find_or_compile(tmp_path / "cache") == path


def test_a_prebuilt_library_comes_first(tmp_path, monkeypatch) -> None:
    prebuilt = tmp_path / build.file_name(build.cpu_target())
    prebuilt.touch()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    assert build.find_or_compile(tmp_path / "cache") == prebuilt


def test_other_sources_have_another_name(tmp_path, monkeypatch) -> None:
    name = build.file_name(build.cpu_target())
    (tmp_path / "other.c").write_text("int x;")
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    assert build.file_name(build.cpu_target()) != name


def test_every_target_has_a_name_of_its_own() -> None:
    assert len({build.file_name(target) for target in build.TARGETS}) == len(build.TARGETS)


def test_a_missing_compiler_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.compile_library(tmp_path, build.cpu_target())


def test_a_compiler_error_is_said_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "bad.c").write_text("this is not C")
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(build.BuildError, match="failed"):
        build.compile_library(target, build.cpu_target())
    assert list(target.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_said(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(build.BuildError, match="file/cache"):
        build.compile_library(tmp_path / "file" / "cache", build.cpu_target())


def _python(code: str, home: Path, path: str) -> str:
    environment = {**os.environ, "HOME": str(home), "PATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(any(build.PREBUILT.glob("*.so")), reason="a prebuilt library is installed")
def test_without_a_compiler_pytorch_takes_over(tmp_path) -> None:
    code = """
import torch
from tgis.models import kernels
print(kernels.describe(), kernels.act(torch.tensor([[-1.0, 2.0]]), "relu").tolist())
"""
    said = _python(code, tmp_path, str(tmp_path))
    assert said.startswith("PyTorch instead of C kernels: no C compiler")
    assert said.endswith("[[0.0, 2.0]]")


def test_one_openmp_runtime_serves_torch_and_the_kernels(tmp_path) -> None:
    code = """
from pathlib import Path
from tgis.models import kernels
from tgis.models.kernels.build import openmp_runtime
import torch
torch.randn(300, 300) @ torch.randn(300, 300)
kernels.act(torch.zeros(64, 4096), "silu")
print(openmp_runtime(), len(list(Path("/proc/self/task").iterdir())))
"""
    one = _python(code, Path.home(), os.environ["PATH"])
    runtime, threads = one.split()
    assert "torch" in runtime
    without = code.replace('kernels.act(torch.zeros(64, 4096), "silu")', "")
    assert threads == _python(without, Path.home(), os.environ["PATH"]).split()[1]
