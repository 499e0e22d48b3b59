"""The C part is had where it can be, and missed in no other way than by speed."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tgis.sampling import Sampler, native, seeds
from tgis.types import NO_DETAILS, SamplingParams


@pytest.fixture
def _fresh() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_without_a_compiler_numpy_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = [
        SamplingParams(do_sample=True, seed=2, top_k=9),
        SamplingParams(do_sample=True, seed=3),
    ]
    logits = torch.randn((20, 2, 2000), generator=torch.Generator().manual_seed(1)) * 3

    def tokens() -> list[list[int]]:
        sampler = Sampler(2000, (2,))
        for i, each in enumerate(params):
            sampler.add(i, each, NO_DETAILS, [])
        return [[c.token_id for c in sampler.sample([0, 1], step.clone())] for step in logits]

    with_library = tokens()
    native.library.cache_clear()
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(native, "_PREBUILT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native.library() is None
    assert isinstance(seeds.noise_stream(1, 8), seeds.NumpyStream)
    assert "no C compiler" in caplog.text
    assert tokens() == with_library


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.usefixtures("_fresh")
def test_compiles_once_and_finds_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(native, "_PREBUILT", tmp_path)
    assert native.library() is not None
    (compiled,) = tmp_path.rglob("*.so")
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile_into", None)  # is not called again
    assert native.library() is not None
    assert [*tmp_path.rglob("*.so")] == [compiled]
