"""What a file looked like when its header was read. A file that changed since is an error, never other numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

__all__ = ["FileStamp", "stamp_key"]


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Which file, how long, and when it was last changed.

    The change time (ctime) is among them because a file can be overwritten and its modification time set back. It also moves
    where only a mode or a link count changed: that is one needless error, and never a missed one.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: str | int) -> FileStamp:
        """The stamp of a path or an open file, now."""
        stat = os.stat(file)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def stamp_key(file: str, stamp: FileStamp) -> str:
    """What tells this content of this file from any other, for caches: real path, size, and times of change."""
    return json.dumps([os.path.realpath(file), stamp.size, stamp.mtime_ns, stamp.ctime_ns])
