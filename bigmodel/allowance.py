"""What may be written to disk: one account for everything that writes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from bigmodel.errors import DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["DiskAllowance"]


class DiskAllowance:
    """The disk tier's limit, and what has been taken of it.

    Args:
        limit_bytes: the most that may be held at once; None for what the disk has free.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        self._lock = threading.RLock()  # a finalizer that gives back may run in the thread that takes

    @property
    def taken_bytes(self) -> int:
        """Bytes that are held now."""
        return self._taken_bytes

    def take(self, num_bytes: int, folder: Path, what: str) -> None:
        """Set bytes aside before they are written.

        Args:
            num_bytes: of the file.
            folder: where it will be; it, or a folder above it, is there.
            what: what is written, for the error.

        Raises:
            DoesNotFitError: beyond the limit, or more than the disk has free.
        """
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with self._lock:
            free = shutil.disk_usage(folder).free
            left = free if self._limit_bytes is None else min(free, self._limit_bytes - self._taken_bytes)
            if num_bytes > left:
                raise DoesNotFitError(
                    f"{what} takes {format_bytes(num_bytes)} of disk in {folder}, and {format_bytes(max(left, 0))} may be "
                    "used. Raise max_memory['disk'], free some space, or give another offload_folder.",
                    tier="disk",
                    needed_bytes=num_bytes,
                    available_bytes=max(left, 0),
                )
            self._taken_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was taken is not held any more."""
        with self._lock:
            self._taken_bytes -= num_bytes
