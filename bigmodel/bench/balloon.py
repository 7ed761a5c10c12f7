"""Memory that the host has already backed, held until just before a measurement and released to it.

In a virtual machine freed memory goes back to the host within seconds, and the first touch of a page after that is a
fault in the host: tens of times slower, and it would measure the host. Every candidate gets the same released memory.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

__all__ = ["Balloon", "available_bytes"]

MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23
MIB = 1 << 20


def available_bytes() -> int:
    """Of this machine's memory, what can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()  # "MemAvailable:   20000000 kB"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


class Balloon:
    """A process that holds touched memory.

    Args:
        num_bytes: how much. Held down to 60% of what is available, so that the benchmark never makes the machine swap
            or kill; `num_bytes` says what it became.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = min(num_bytes, available_bytes() * 6 // 10) // (2 * MIB) * (2 * MIB)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bigmodel.bench.balloon"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fill(self, num_bytes: int | None = None) -> None:
        """Touch so much memory, at most what the balloon holds (None), unless some is held already."""
        wanted = self.num_bytes if num_bytes is None else min(num_bytes, self.num_bytes)
        self._ask(f"fill {wanted}")

    def release(self) -> None:
        """Give the memory to whoever touches it next."""
        self._ask("release")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __enter__(self) -> Balloon:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, words: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise RuntimeError(f"the balloon process ended while it was asked to {words}. Is the memory there?")


def main() -> None:
    from bigmodel.bench.child import die_with_parent

    die_with_parent()
    # Where memory runs out, this process goes first and the benchmark says so.
    Path("/proc/self/oom_score_adj").write_text("1000")
    held: mmap.mmap | None = None
    for line in sys.stdin:
        word, _, size = line.strip().partition(" ")
        if word == "fill" and held is None and int(size):
            held = mmap.mmap(-1, int(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            held.madvise(MADV_HUGEPAGE)
            try:
                held.madvise(MADV_POPULATE_WRITE)
            except OSError:  # before Linux 5.14
                start = ctypes.c_char.from_buffer(held)
                ctypes.memset(ctypes.addressof(start), 1, len(held))
                del start
        elif word == "release" and held is not None:
            held.close()
            held = None
        print("done", flush=True)


if __name__ == "__main__":
    main()
