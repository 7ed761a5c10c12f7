"""A map of a checkpoint file: the bytes of a weight where they stand, without a copy."""

from __future__ import annotations

import mmap
import os
import platform
import sys
import threading
import weakref

import numpy as np
import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.errors import MalformedFileError, ReadError
from bigmodel.offload.reader import check_stamp

__all__ = ["FileMap", "is_written", "mapped_files"]

# Python's mmap names it from 3.13 on. Without it a private map of a file larger than RAM may be refused; the number is
# the same on the architectures named here.
_MAP_NORESERVE: int = getattr(
    mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64", "riscv64", "s390x") else 0
)


class FileMap:
    """A private map of one checkpoint file, made at the first view and kept as long as any view lives.

    Pages are the page cache's. A write through a view stays in this process and in that page: it reaches neither the
    file nor, unlike a read-only map, ends the process.

    Args:
        path: of the file.
        stamp: what the file looked like when its header was read; None for whatever it is now.
    """

    def __init__(self, path: str | os.PathLike[str], *, stamp: FileStamp | None = None) -> None:
        self.path = os.fspath(path)
        self._stamp = stamp
        self._map: mmap.mmap | None = None
        self._identity: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def view(self, source: Source, *, random: bool = False) -> torch.Tensor:
        """The parameter's bytes where they stand in the file, without a copy.

        Args:
            source: one with `is_view`, or with no elements.
            random: whether its rows will be looked up one by one: then the kernel does not read ahead.

        Returns:
            A CPU tensor of the source's dtype and shape.

        Raises:
            MalformedFileError: where the file has become shorter than the range.
            ReadError: where it cannot be opened or mapped, or changed since it was stamped.
        """
        if source.nbytes == 0:
            return torch.empty(source.shape, dtype=source.dtype, device="cpu")
        if not source.is_view or source.extents[0].file != self.path:
            raise ValueError(f"{source.name} is not one plain range of {self.path}.")
        begin, nbytes = source.extents[0].offset, source.extents[0].nbytes
        with self._lock:
            if self._map is None:
                self._map = self._open()
                _paths[self._map] = os.path.abspath(self.path)
            mapped = self._map
            size = self._size(mapped)
        if begin + nbytes > size:
            raise MalformedFileError(
                f"{source.name} ends at byte {begin + nbytes} of {self.path}, which has {size} bytes: the file was cut "
                f"or replaced after it was opened. Restore the file and load the model again."
            )
        if random:
            first = begin - begin % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_RANDOM, first, begin + nbytes - first)
        with torch.inference_mode(False):  # a tensor made inside it could never be written to outside
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=begin)
            return flat.view(source.dtype).view(source.shape)

    def _open(self) -> mmap.mmap:
        flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self._stamp is not None:
                    check_stamp(file.fileno(), self.path, {self.path: self._stamp})
                stat = os.fstat(file.fileno())
                self._identity = stat.st_dev, stat.st_ino
                if stat.st_size == 0:
                    raise MalformedFileError(f"{self.path} has 0 bytes: the file was cut after it was opened.")
                if sys.version_info >= (3, 13):  # a checkpoint has hundreds of files, and each map would keep one open
                    return mmap.mmap(file.fileno(), stat.st_size, flags=flags, prot=prot, trackfd=False)
                return mmap.mmap(file.fileno(), stat.st_size, flags=flags, prot=prot)
        except OSError as error:
            raise ReadError(
                f"{self.path} could not be mapped into memory: {error.strerror or error}. Check that it is there, "
                f"readable and on a file system that can map files."
            ) from error

    def _size(self, mapped: mmap.mmap) -> int:
        """Bytes that can be read without SIGBUS: the map's, or fewer where its file has been cut since."""
        try:
            stat = os.stat(self.path)
        except OSError:
            return len(mapped)  # removed or renamed: the map keeps the file itself
        return min(len(mapped), stat.st_size) if (stat.st_dev, stat.st_ino) == self._identity else len(mapped)


def is_written(view: torch.Tensor) -> bool:
    """Whether somebody wrote through a view: its pages are then this process's own, and no longer the file's.

    False where the system does not say.

    Source: the pagemap file, in the kernel's admin-guide (bit 61: a page of a file; bits 62 and 63: swapped, present).
    """
    first = view.data_ptr() // mmap.PAGESIZE
    num_pages = -(-(view.data_ptr() + view.nbytes) // mmap.PAGESIZE) - first
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = np.frombuffer(os.pread(file.fileno(), 8 * num_pages, 8 * first), dtype=np.uint64)
    except OSError:
        return False
    kind = entries >> np.uint64(61)
    return bool(((kind & np.uint64(1)) == 0)[kind >= 2].any())


def mapped_files() -> frozenset[str]:
    """Absolute paths of the files that a FileMap has mapped and of which a view may still live."""
    return frozenset(list(_paths.values()))


_paths: weakref.WeakKeyDictionary[mmap.mmap, str] = weakref.WeakKeyDictionary()
