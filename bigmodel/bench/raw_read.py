"""What the disk gives: plain O_DIRECT reads of the same bytes, with nothing around them.

Called in a child process; numbers of threads and blocks are the caller's.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ["ALIGNMENT", "Range", "read_into_fresh_memory", "read_into_ring", "widened"]

MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23
HUGE_PAGE = 2 << 20
# Offsets, lengths and addresses of a direct read: 4096 serves every logical block size in use.
ALIGNMENT = 4096

Range = tuple[str, int, int]
"""File, offset, bytes."""


def widened(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in file order, widened to the alignment and merged where they touch."""
    merged: list[Range] = []
    for file, offset, size in sorted(ranges):
        begin, end = offset // ALIGNMENT * ALIGNMENT, -(-(offset + size) // ALIGNMENT) * ALIGNMENT
        if merged and merged[-1][0] == file and begin <= sum(merged[-1][1:]):
            begin, end = merged[-1][1], max(end, sum(merged[-1][1:]))
            merged.pop()
        merged.append((file, begin, end - begin))
    return merged


def read_into_fresh_memory(path: str, num_threads: int, block_bytes: int) -> dict[str, float]:
    """Read every file whole into fresh huge-page memory; taking the memory is inside the clock.

    Returns:
        ``seconds``, ``cpu_seconds`` (all threads, user and system) and ``num_bytes``.
    """
    files = [(str(file), file.stat().st_size) for file in sorted(Path(path).glob("*.safetensors"))]
    start, start_cpu = time.perf_counter(), time.process_time()
    blocks: list[tuple[str, int, memoryview]] = []
    arenas = []
    for file, size in files:
        arena = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arena.madvise(MADV_HUGEPAGE)
        arenas.append(arena)
        view = memoryview(arena)
        for offset in range(0, size, block_bytes):
            length = min(block_bytes, -(-(size - offset) // ALIGNMENT) * ALIGNMENT)
            blocks.append((file, offset, view[offset : offset + length]))
    num_bytes = _read_all(blocks, num_threads)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    if num_bytes != sum(size for _, size in files):
        raise OSError(f"{num_bytes} bytes were read of {sum(size for _, size in files)}")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "num_bytes": num_bytes}


def read_into_ring(
    ranges: Sequence[Range], num_threads: int, block_bytes: int, ring_bytes: int, num_passes: int
) -> dict[str, object]:
    """Read the same ranges again and again into one fixed ring of touched huge pages.

    Args:
        ranges: aligned, as `widened` gives them.
        num_threads, block_bytes: of the reads.
        ring_bytes: that are written over in turn.
        num_passes: how often all of them are read.

    Returns:
        ``seconds`` and ``cpu_seconds`` (a list each, one entry per pass), ``num_bytes`` of one pass.
    """
    ring_bytes = -(-ring_bytes // block_bytes) * block_bytes
    ring = mmap.mmap(-1, ring_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ring.madvise(MADV_HUGEPAGE)
    ring.madvise(MADV_POPULATE_WRITE)
    view, at = memoryview(ring), 0
    blocks: list[tuple[str, int, memoryview]] = []
    for file, begin, size in ranges:
        for offset in range(begin, begin + size, block_bytes):
            length = min(block_bytes, begin + size - offset)
            blocks.append((file, offset, view[at : at + length]))
            at = (at + block_bytes) % ring_bytes
    seconds, cpu_seconds, num_bytes = [], [], 0
    for _ in range(num_passes):
        start, start_cpu = time.perf_counter(), time.process_time()
        num_bytes = _read_all(blocks, num_threads)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - start_cpu)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "num_bytes": num_bytes}


def _read_all(blocks: list[tuple[str, int, memoryview]], num_threads: int) -> int:
    """Read the blocks in order with `num_threads` threads; bytes that arrived."""
    descriptors = {
        file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in dict.fromkeys(file for file, _, _ in blocks)
    }
    remaining = iter(blocks)
    lock = threading.Lock()
    counts, errors = [0] * num_threads, []

    def work(number: int) -> None:
        try:
            while True:
                with lock:
                    block = next(remaining, None)
                if block is None:
                    return
                file, offset, destination = block
                # Short only at the end of a file, whose last length is rounded up.
                counts[number] += os.preadv(descriptors[file], [destination], offset)
        except OSError as error:
            errors.append(error)

    _in_threads(work, num_threads)
    for descriptor in descriptors.values():
        os.close(descriptor)
    if errors:
        raise errors[0]
    return sum(counts)


def _in_threads(work: Callable[[int], None], num_threads: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
