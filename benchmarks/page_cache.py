"""The page cache of the checkpoint's files: drop it, fill it, and see which it is."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cached_bytes", "drop_from_cache", "read_into_cache"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of these files that are in the page cache now (all of them for a user who may not write the files)."""
    return sum(_cached_bytes(file) for file in files)


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


def _cached_bytes(file: Path) -> int:
    size = file.stat().st_size
    if size == 0:
        return 0
    with file.open("rb") as stream:
        # Private and writable only because ctypes takes the address of nothing else; no page is touched.
        view = mmap.mmap(stream.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    num_pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * num_pages)()
    start = ctypes.c_char.from_buffer(view)
    failed = _libc.mincore(ctypes.addressof(start), size, flags)
    del start
    view.close()
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {file.name}")
    return sum(flag & 1 for flag in bytes(flags)) * mmap.PAGESIZE
