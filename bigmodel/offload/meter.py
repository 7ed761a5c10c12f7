"""What readers and links measure of themselves: bytes, and the seconds in which at least one of them was under way."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Flow", "Meter", "Moved", "Reads", "Way"]

# A best rate is one that held for so long: shorter ones are what a disk's own memory gives.
_BEST_OVER_S = 0.1
# ... and of so many bytes, beside which what several readers had begun before is little.
_BEST_OVER_BYTES = 256 << 20


class Way(enum.Enum):
    """How a block is read."""

    DIRECT = enum.auto()  # past the page cache
    CACHED = enum.auto()  # copied from the page cache, where it was
    BUFFERED = enum.auto()  # through the page cache, because the file system has no direct reads


@dataclass(frozen=True, slots=True)
class Moved:
    """What was copied over a link.

    Attributes:
        num_bytes: whose copies have ended.
        busy_s: that these copies took; 0 where the device does not tell.
    """

    num_bytes: int = 0
    busy_s: float = 0.0

    def __sub__(self, earlier: Moved) -> Moved:
        return Moved(self.num_bytes - earlier.num_bytes, self.busy_s - earlier.busy_s)


@dataclass(frozen=True, slots=True)
class Reads:
    """What was read from files. Subtract two for what was read in between.

    Attributes:
        num_bytes: read from the disk.
        busy_s: wall seconds in which at least one such read was in flight.
        num_blocks: such reads.
        buffered_bytes: of `num_bytes`, those that went through the page cache because the file system has no direct reads.
        cached_bytes: copied from the page cache, beside `num_bytes`.
        best_bytes_per_s: the highest rate that reads from the disk held for a tenth of a second, since the readers began.
    """

    num_bytes: int = 0
    busy_s: float = 0.0
    num_blocks: int = 0
    buffered_bytes: int = 0
    cached_bytes: int = 0
    best_bytes_per_s: float = 0.0

    def __sub__(self, earlier: Reads) -> Reads:
        return Reads(
            self.num_bytes - earlier.num_bytes,
            self.busy_s - earlier.busy_s,
            self.num_blocks - earlier.num_blocks,
            self.buffered_bytes - earlier.buffered_bytes,
            self.cached_bytes - earlier.cached_bytes,
            self.best_bytes_per_s,
        )


@dataclass(frozen=True, slots=True)
class Flow:
    """What has moved up to some moment. Subtract two for what moved in between.

    Attributes:
        reads: from files.
        copies: device -> over its link.
        is_page_locked: whether what is copied lies in page-locked host memory.
    """

    reads: Reads = Reads()
    copies: Mapping[str, Moved] = field(default_factory=dict)
    is_page_locked: bool = True

    def __sub__(self, earlier: Flow) -> Flow:
        copies = {device: moved - earlier.copies.get(device, Moved()) for device, moved in self.copies.items()}
        return Flow(self.reads - earlier.reads, copies, self.is_page_locked)


class Meter:
    """Adds up reads of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_under_way = 0
        self._since_s = 0.0  # when the first of those under way began
        self._num_bytes = self._num_blocks = self._buffered_bytes = self._cached_bytes = 0
        self._busy_s = self._best = 0.0
        self._span_bytes, self._span_s = 0, 0.0  # of the stretch whose rate may be the best

    @contextmanager
    def reading(self, num_bytes: int, way: Way) -> Iterator[None]:
        """Around one read; it counts when it succeeds."""
        if way is Way.CACHED:
            yield
            with self._lock:
                self._cached_bytes += num_bytes
            return
        with self._lock:
            if not self._num_under_way:
                self._since_s = time.perf_counter()
            self._num_under_way += 1
        done = 0
        try:
            yield
            done = num_bytes
        finally:
            with self._lock:
                self._advance()
                self._num_under_way -= 1
                self._num_bytes += done
                self._num_blocks += done > 0
                self._buffered_bytes += done if way is Way.BUFFERED else 0
                self._span_bytes += done
                if self._span_s >= _BEST_OVER_S and self._span_bytes >= _BEST_OVER_BYTES:
                    self._best = max(self._best, self._span_bytes / self._span_s)
                    self._span_bytes, self._span_s = 0, 0.0

    def reads(self) -> Reads:
        """All up to now."""
        with self._lock:
            self._advance()
            average = self._num_bytes / self._busy_s if self._busy_s else 0.0
            return Reads(
                self._num_bytes,
                self._busy_s,
                self._num_blocks,
                self._buffered_bytes,
                self._cached_bytes,
                max(self._best, average),
            )

    def _advance(self) -> None:
        """Count the time up to now, where reads are under way."""
        if self._num_under_way:
            now_s = time.perf_counter()
            self._busy_s += now_s - self._since_s
            self._span_s += now_s - self._since_s
            self._since_s = now_s
