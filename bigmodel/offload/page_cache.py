"""Ask the kernel how much of a file is already in memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

import numpy as np

__all__ = ["cached_fraction", "can_tell"]

_PAGE_BYTES = mmap.PAGESIZE


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        libc.syscall.restype = ctypes.c_long
    except (OSError, AttributeError):
        return None
    return libc


def can_tell(fd: int) -> bool:
    """Whether `cached_fraction` means anything: the kernel answers "all of it" for files that we neither own nor may write."""
    try:
        return os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)
    except OSError:
        return False


def cached_fraction(fd: int, offset: int, nbytes: int) -> float:
    """Fraction (0..1) of a file's range that is in the page cache; 0.0 where the system cannot say."""
    size = os.fstat(fd).st_size
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = min(offset + nbytes, size) - start
    if length <= 0 or _libc() is None or not can_tell(fd):
        return 0.0
    num_pages = -(-length // _PAGE_BYTES)
    num_cached = _count(fd, start, length)
    if num_cached is None:
        num_cached = _walk(fd, start, length, num_pages)
    return min(1.0, num_cached / num_pages)


# The same on every architecture; in Linux since 6.5.
_CACHESTAT = 451


def _count(fd: int, start: int, length: int) -> int | None:
    """Cached pages of a range, counted by the kernel; None where it does not count.

    Source: include/uapi/linux/mman.h, struct cachestat: cached, dirty, written back, evicted, recently evicted.
    """
    libc = _libc()
    assert libc is not None
    wanted, counts = (ctypes.c_uint64 * 2)(start, length), (ctypes.c_uint64 * 5)()
    failed = libc.syscall(ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), wanted, counts, ctypes.c_uint(0))
    return None if failed else int(counts[0])


def _walk(fd: int, start: int, length: int, num_pages: int) -> int:
    """The same on older systems: each page's bit, milliseconds for a gigabyte."""
    libc = _libc()
    assert libc is not None
    with mmap.mmap(fd, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=start) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)
        pages = np.empty(num_pages, dtype=np.uint8)
        failed = libc.mincore(view.ctypes.data, length, pages.ctypes.data)
        del view
    return 0 if failed else int((pages & 1).sum())
