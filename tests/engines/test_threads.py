"""How many threads each process of a model gets."""

from pathlib import Path

import pytest

from tgis.engines import threads
from tgis.engines.threads import SMALL_MODEL_BYTES, choose_threads, usable_cores
from tgis.types import ModelFiles, ModelKind


def model(tmp_path: Path, num_bytes: int) -> ModelFiles:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(num_bytes)
    return ModelFiles(
        name="m",
        path=str(tmp_path),
        model_type="llama",
        kind=ModelKind.DECODER_ONLY,
        weights=("model.safetensors",),
        config={},
    )


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1), ("nonsense", 8)],
)
def test_a_cgroup_may_allow_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path / "cpu.max") == cores
    assert usable_cores(tmp_path / "nothing") == 8


@pytest.mark.parametrize(
    ("setting", "num_bytes", "num_ranks", "expected"),
    [
        (None, SMALL_MODEL_BYTES, 1, 8),
        (None, SMALL_MODEL_BYTES - 1, 1, 1),
        (None, 4 * SMALL_MODEL_BYTES, 2, 4),
        (None, 4 * SMALL_MODEL_BYTES, 3, 2),
        (None, 4 * SMALL_MODEL_BYTES - 1, 4, 1),  # a rank's part is small
        (None, 100 * SMALL_MODEL_BYTES, 16, 1),
        (3, SMALL_MODEL_BYTES - 1, 4, 3),
    ],
)
def test_ranks_share_the_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: int | None,
    num_bytes: int,
    num_ranks: int,
    expected: int,
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    chosen, why = choose_threads(setting, model(tmp_path, num_bytes), num_ranks)
    assert chosen == expected
    assert why


@pytest.mark.parametrize(
    ("environ", "spins"),
    [
        ({}, "20000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_waiting_threads_sleep_soon_unless_told_otherwise(
    environ: dict[str, str], spins: str | None
) -> None:
    threads.prepare_openmp(environ)
    assert environ.get("GOMP_SPINCOUNT") == spins
