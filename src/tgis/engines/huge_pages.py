"""Weights on huge pages.

A step reads all weights once. With pages of 4 KiB much of that time goes into finding the pages,
more so in a virtual machine: there huge ones made a plain read of memory 1.4 times as fast.
"""

import ctypes
import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

HUGE_BYTES = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1
_PRESENT = np.uint64(1 << 63)  # in /proc/self/pagemap
# A huge page takes memory for pages that have not been used yet; there should be few.
_LEAST_PRESENT = 0.9
# Private, writable, of no file: the C library's heap and what it maps for large blocks.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?$", re.MULTILINE)

Span = tuple[int, int]


def use_huge_pages() -> int:
    """Move what this process holds in memory now to huge pages; call it when weights are loaded.

    Nothing happens where the operating system cannot do that, or has no huge page to give.

    Returns:
        Bytes that are on huge pages then.
    """
    moved = 0
    try:
        for first, last in _full_spans():
            moved += _collapse(first, last)
    except OSError as error:
        log.debug("no huge pages: %s", error)
    log.info("%d MiB of memory are on huge pages", moved >> 20)
    return moved


def _full_spans() -> Iterator[Span]:
    """Runs of memory that make whole huge pages, almost all of it used."""
    page = os.sysconf("SC_PAGE_SIZE")
    per_huge = HUGE_BYTES // page
    with open("/proc/self/pagemap", "rb") as pagemap:
        for match in _MAPPING.finditer(Path("/proc/self/maps").read_text()):
            first = -(-int(match[1], 16) // HUGE_BYTES)
            last = int(match[2], 16) // HUGE_BYTES
            if first >= last:
                continue
            pagemap.seek(first * per_huge * 8)
            entries = np.frombuffer(pagemap.read((last - first) * per_huge * 8), dtype=np.uint64)
            present = (entries & _PRESENT != 0).reshape(-1, per_huge).mean(axis=1)
            full = np.flatnonzero(present >= _LEAST_PRESENT) + first
            for run in np.split(full, np.flatnonzero(np.diff(full) != 1) + 1):
                if len(run):
                    yield int(run[0]) * HUGE_BYTES, (int(run[-1]) + 1) * HUGE_BYTES


def _collapse(first: int, last: int) -> int:
    """Bytes from address `first` to `last` that have been moved."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(first, last - first, _COLLAPSE) == 0:
        return last - first
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    return 0  # some of it may have been: no huge page was free, or a page was busy
