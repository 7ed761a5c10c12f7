"""Host memory that weights are read into: anonymous, page-aligned, in huge pages where they help."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import torch

from bigmodel.errors import DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["ALIGN_BYTES", "Arena"]

# Direct reads want file offset, length and address aligned to the device's logical block, 512 or 4096 bytes; 4096 serves both.
ALIGN_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
# Below this a huge page wastes more memory than it saves page faults.
_HUGE_FROM_BYTES = 8 << 20


class Arena:
    """One anonymous private mapping, given back when the last tensor that views it is gone.

    First touch of fresh 4 KiB pages runs at 1-2.5 GB/s, of huge pages at 14-23 GB/s (measured), and torch's allocator does not
    ask for huge pages: weights that are read from a fast disk would wait for the page faults.

    Raises:
        DoesNotFitError: the system does not map so much.

    Attributes:
        nbytes: usable bytes.
        tensor: uint8 tensor of shape (nbytes,), starting at a multiple of ALIGN_BYTES; uninitialised (zero).
        memory: the same bytes as a writable memoryview, for `os.preadv`.
    """

    __slots__ = ("_mapping", "memory", "nbytes", "tensor")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        is_huge = nbytes >= _HUGE_FROM_BYTES
        slack = _HUGE_PAGE_BYTES if is_huge else 0
        self._mapping = mapping = _map(max(nbytes, 1) + slack)
        start = 0
        if is_huge:
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            start = -address % _HUGE_PAGE_BYTES
            # Whole huge pages only: the tail keeps 4 KiB pages, so that no more than `nbytes` becomes resident.
            whole = nbytes - nbytes % _HUGE_PAGE_BYTES
            mapping.madvise(mmap.MADV_HUGEPAGE, start, whole)
        self.memory = memoryview(mapping)[start : start + nbytes]
        # Built outside inference mode whatever the caller's mode is: such views could not be written by another thread.
        with torch.inference_mode(False):
            self.tensor = (
                torch.frombuffer(self.memory, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)
            )

    def fresh(self) -> Arena:
        """Another one, as large."""
        return Arena(self.nbytes)

    def before_release(self, run: Callable[[], object]) -> None:
        """Call `run` when the last tensor that views the memory is gone, before the memory goes."""
        self._mapping.before_release = run


class _Mapping(mmap.mmap):
    before_release: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.before_release is not None:
            self.before_release()


def _map(nbytes: int) -> _Mapping:
    try:
        return _Mapping(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # a limit on address space, or a system that does not overcommit
        raise DoesNotFitError(
            f"{format_bytes(nbytes)} of host memory could not be mapped: {error.strerror}. State a smaller "
            "max_memory['cpu'], or raise what this process may map (ulimit -v, vm.overcommit_memory).",
            tier="cpu",
            needed_bytes=nbytes,
            available_bytes=0,
        ) from error
