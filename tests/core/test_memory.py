"""How much memory there is, and what it is enough for."""

import logging
from pathlib import Path

import pytest
from tests.kit.fake_engine import FakeEngine

from tgis.core.memory import kv_capacity, step_memory
from tgis.engines.base import CacheShape
from tgis.engines.host_memory import available_memory
from tgis.engines.plan import StepPlan
from tgis.errors import ConfigError

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    return tmp_path


def group(root: Path, path: str, **files: str) -> None:
    directory = root / "sys/fs/cgroup" / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_without_cgroups_the_machine_is_the_limit(root: Path) -> None:
    assert available_memory(root) == 8000 * 1024


def test_version_2_counts_every_level_and_not_the_cached_files(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/pod/app\n")
    stat = "anon 5\ninactive_file 1000\n"
    group(root, "pod/app", memory__max="max", memory__current="5000", memory__stat=stat)
    assert available_memory(root) == 8000 * 1024
    group(root, "pod", memory__max="700000", memory__current="5000", memory__stat=stat)
    assert available_memory(root) == 700_000 - 5000 + 1000
    group(root, "pod/app", memory__max="600000")
    assert available_memory(root) == 600_000 - 5000 + 1000


def test_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n")
    unlimited = "9223372036854771712"
    for path, limit in (("memory/x", unlimited), ("memory", "400000")):
        group(
            root,
            path,
            memory__limit_in_bytes=limit,
            memory__usage_in_bytes="3000",
            memory__stat="total_inactive_file 500\n",
        )
    assert available_memory(root) == 400_000 - 3000 + 500


def test_a_namespaced_path_that_is_not_visible_falls_back_to_the_mount(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/../../host/path\n")
    group(root, "", memory__max="5000", memory__current="9000", memory__stat="")
    assert available_memory(root) == 0


def test_this_machine_has_some() -> None:
    assert available_memory() > MIB


def test_the_pool_is_what_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert kv_capacity(10_000, 10, 100, 10**6) == 1000
    (line,) = caplog.messages
    assert "memory fits 1000 tokens" in line
    assert "10 sequences of 100 tokens" in line


def test_the_pool_is_whole_granules_and_no_larger_than_it_can_be_used() -> None:
    assert kv_capacity(10_000, 10, 100, 10**6, granule=64) == 960
    assert kv_capacity(10_000, 10, 100, 500) == 500


def test_a_sequence_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        kv_capacity(10_000, 10, 1001, 10**6)
    assert "--max-sequence-length 1001" in str(error.value)
    assert "10010 bytes" in str(error.value)
    assert "--kv-cache-memory is 10000" in str(error.value)
    with pytest.raises(ConfigError):
        kv_capacity(10_000, 10, 1000, 10**6, granule=64)  # 1000 tokens take 1024


def test_a_step_is_measured_and_scaled() -> None:
    held = []

    def take(plan: StepPlan) -> None:
        held.append(bytearray(64 * MIB))
        held.clear()

    engine = FakeEngine(take)
    engine.allocate(CacheShape(2, 4096))
    measured = step_memory(engine, 512, 4096)
    assert engine.plans[0].num_tokens == engine.plans[0].num_logits == 64
    assert engine.cache.slots[0] == []
    assert 0.9 * 512 * MIB <= measured <= 1.5 * 512 * MIB
