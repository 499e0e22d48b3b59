"""Memory moves to huge pages and keeps what it holds."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from tgis.engines import huge_pages
from tgis.engines.huge_pages import HUGE_BYTES, use_huge_pages


def huge_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"AnonHugePages:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def test_memory_in_use_moves_and_keeps_its_content() -> None:
    values = np.random.default_rng(0).integers(0, 2**63, 4 * HUGE_BYTES // 8)
    before, held = values.copy(), huge_bytes()
    moved = use_huge_pages()
    assert np.array_equal(values, before)
    if not moved:
        pytest.skip("this system has no huge pages to give")
    assert moved >= 3 * HUGE_BYTES
    assert huge_bytes() > held


def test_memory_that_is_hardly_used_stays_as_it_is() -> None:
    sparse = mmap.mmap(-1, 16 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, len(sparse), HUGE_BYTES):
        sparse[start] = 1
    address = np.frombuffer(sparse, dtype=np.uint8).ctypes.data
    spans = list(huge_pages._full_spans())
    assert not any(first < address + len(sparse) and address < last for first, last in spans)


def test_a_system_that_cannot_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_COLLAPSE", 9999)
    held = np.ones(4 * HUGE_BYTES, dtype=np.uint8)
    assert use_huge_pages() == 0
    assert held.all()
