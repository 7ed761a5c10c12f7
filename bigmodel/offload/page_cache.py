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
def _mincore() -> ctypes._NamedFuncPointer | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return function


def can_tell(fd: int) -> bool:
    """Whether `cached_fraction` means anything: the kernel answers "all of it" for files that we neither own nor may write."""
    try:
        return os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)
    except OSError:
        return False


def cached_fraction(fd: int, offset: int, nbytes: int) -> float:
    """Fraction (0..1) of a file's range that is in the page cache; 0.0 where the system cannot say."""
    function = _mincore()
    size = os.fstat(fd).st_size
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = min(offset + nbytes, size) - start
    if function is None or length <= 0 or not can_tell(fd):
        return 0.0
    with mmap.mmap(fd, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=start) as mapping:
        view = np.frombuffer(mapping, dtype=np.uint8)
        pages = np.empty(-(-length // _PAGE_BYTES), dtype=np.uint8)
        failed = function(view.ctypes.data, length, pages.ctypes.data)
        del view
    return 0.0 if failed else float((pages & 1).mean())
