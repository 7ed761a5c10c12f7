"""The page cache of the checkpoint's files: drop it, fill it, and see which it is."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bigmodel.offload.page_cache import cached_fraction

__all__ = ["cached_bytes", "drop_from_cache", "read_into_cache"]


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of these files that are in the page cache now; 0 where the kernel does not say, as to one who may not write them."""
    total = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            total += int(size * cached_fraction(descriptor, 0, size))
        finally:
            os.close(descriptor)
    return total


def drop_from_cache(files: Iterable[Path], timeout_s: float = 20.0) -> int:
    """Drop these files from the page cache.

    First by asking for each file, then, where pages stay and the user is root, by dropping every clean page of the
    machine. (The latter alone would make the libraries cold too, which is not what is measured.)

    Args:
        files: whose pages.
        timeout_s: pages that a process has mapped stay; how long to wait for that process to end.

    Returns:
        Bytes that are still cached: 0, or a few pages, where it worked.
    """
    files = list(files)
    size = sum(file.stat().st_size for file in files)
    until = time.monotonic() + timeout_s
    while True:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # dirty pages are not dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        left = cached_bytes(files)
        if left and os.geteuid() == 0:
            with suppress(OSError):  # not in every container
                Path("/proc/sys/vm/drop_caches").write_text("1")
            left = cached_bytes(files)
        if left <= size // 1000 or time.monotonic() > until:
            return left
        time.sleep(0.5)


def read_into_cache(files: Iterable[Path], block_bytes: int = 8 << 20) -> None:
    """Read these files through the page cache once, so that all of them are in it."""
    with mmap.mmap(-1, block_bytes) as buffer:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                offset = 0
                while count := os.preadv(descriptor, [buffer], offset):
                    offset += count
            finally:
                os.close(descriptor)
