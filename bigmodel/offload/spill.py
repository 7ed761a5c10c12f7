"""Memory that is a file: where bytes go that somebody wants a pointer to and that no file of the checkpoint shows."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from bigmodel.allowance import DiskAllowance
from bigmodel.errors import DoesNotFitError, WeightNotResidentError
from bigmodel.units import format_bytes

__all__ = ["Spill", "trim_heap"]

# Below this a file, a map and their pages cost more than the memory that they save.
SMALL_BYTES = 64 << 10
_WRITE_BYTES = 64 << 20
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs", "hugetlbfs"})


class Spill:
    """Gives tensors whose pages are those of a file without a name: evictable, gone with the last tensor.

    A writer such as safetensors or torch.save collects the pointers of a whole file before it writes the first byte.
    Held in anonymous memory, that would be the model; held here, it is disk that we write and page cache.

    Args:
        folder: where the files are made; None for the first of the system's temporary folders that is on a disk.
        allowance: the account that the files are charged to while they are in use; None for one without a limit.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, allowance: DiskAllowance | None = None) -> None:
        self._folder = None if folder is None else os.fspath(folder)
        self._allowance = allowance or DiskAllowance()

    def hold(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The same bytes, flat, in memory that is a file.

        Args:
            tensor: contiguous, on the CPU; small ones are returned as they are.
            name: what it is; named in errors.

        Returns:
            A uint8 tensor, 1-D. The file lives as long as it, or a view of it, does.

        Raises:
            WeightNotResidentError: where the limit or the disk has no room for it.
        """
        flat = tensor.reshape(-1).view(torch.uint8)
        nbytes = flat.numel()
        if nbytes < SMALL_BYTES:
            return flat
        folder = self._folder if self._folder is not None else _disk_folder()
        if folder is None:
            return flat  # every temporary folder is memory too: a file there would only hide what it holds
        try:
            self._allowance.take(nbytes, Path(folder), f"A copy of {name}")
        except DoesNotFitError as error:
            raise WeightNotResidentError(
                f"{name} is needed at one address outside its unit's forward. {error} bigmodel.save needs none of it."
            ) from error
        try:
            mapped = _write_and_map(flat, folder)
        except OSError as error:
            self._allowance.give_back(nbytes)
            raise WeightNotResidentError(
                f"{name} is needed at one address outside its unit's forward, and its {format_bytes(nbytes)} could not "
                f"be written to {folder}: {error.strerror or error}. Use bigmodel.save to save the model, or "
                f"bigmodel.materialize to have all of it in memory."
            ) from error
        weakref.finalize(mapped, self._allowance.give_back, nbytes).atexit = False
        return torch.frombuffer(mapped, dtype=torch.uint8)


def trim_heap() -> None:
    """Give memory that malloc keeps back to the system.

    Tensors of a few MiB that come and go beside small ones that stay leave holes, which malloc does not return: saving
    a model of 14 such tensors, one at a time, held 262 MB more than it used (measured with glibc 2.36).
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return lambda pad: None  # only glibc has it
    trim.argtypes = [ctypes.c_size_t]
    return cast(Callable[[int], object], trim)


def _write_and_map(flat: torch.Tensor, folder: str) -> mmap.mmap:
    """A private map of a new file without a name that holds the bytes of `flat`."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        view = flat.numpy().data
        start = 0
        while start < len(view):
            start += file.write(view[start : start + _WRITE_BYTES])
        return mmap.mmap(file.fileno(), len(view), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _disk_folder() -> str | None:
    """The first temporary folder that is not memory itself."""
    for folder in (tempfile.gettempdir(), "/var/tmp"):
        if os.path.isdir(folder) and os.access(folder, os.W_OK) and _file_system(folder) not in _MEMORY_FILE_SYSTEMS:
            return folder
    return None


def _file_system(folder: str) -> str | None:
    """The type of the file system that a folder is on, such as ``"ext4"``; None where the system does not say."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            for line in file:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except OSError:
        return None
    return None
