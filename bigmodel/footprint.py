"""Host memory of this process as a budget counts it, and its peak while something runs."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from types import TracebackType

__all__ = [
    "MAPPED_BYTES",
    "PRODUCTS_KEPT",
    "PeakFootprint",
    "bound_heap",
    "bound_product_cache",
    "footprint_bytes",
    "trim_heap",
    "use_huge_pages",
]

STATUS_FILE = Path("/proc/self/status")
# A decode step of a dense model has about twenty shapes.
PRODUCTS_KEPT = 32
MAPPED_BYTES = 4 << 20
"""Of the smallest block that malloc maps by itself after `bound_heap`."""
# <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_WORTH_BYTES = 64 << 20
PERIOD_S = 0.005
"""Between two samples; one costs about 30 us."""


def footprint_bytes(pid: int | None = None) -> int:
    """RssAnon + RssShmem of a process, this one if None; 0 where the system does not say, or the process is gone.

    That memory is given back when the process ends. Clean pages of mapped files are not in it: the kernel drops them when memory
    is short.

    Source: proc_pid_status(5).
    """
    try:
        text = (STATUS_FILE if pid is None else Path(f"/proc/{pid}/status")).read_text()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem") if name in fields)


class PeakFootprint:
    """Samples a footprint from a thread while the `with` block runs.

    Args:
        pid: of the process; this one if None.

    Attributes:
        peak_bytes: the largest that was seen, in bytes; at least the value on entry and on exit.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="bigmodel-footprint", daemon=True)

    def __enter__(self) -> PeakFootprint:
        self.peak_bytes = footprint_bytes(self._pid)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, footprint_bytes(self._pid))

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, footprint_bytes(self._pid))


def bound_product_cache() -> None:
    """Keep what oneDNN remembers small: a compiled product for every shape, up to 0.8 MiB each and 1024 of them.

    A run whose shapes change (prompt lengths, experts' shares of the tokens) held 80 MiB of them after one pass of a mixture of
    16 experts, and would come to hold hundreds (measured in bfloat16, torch 2.13). It has no effect where the process has
    multiplied in half precision before, and gives way to what the user set.

    Source: oneDNN's guide, "Primitive Cache"; the variable is read when the cache is first used.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))


def bound_heap() -> bool:
    """Have malloc map blocks of 4 MiB and more one by one, so that each goes back when it is freed.

    glibc raises that bound to the largest block that was freed, up to 32 MiB, and serves what is smaller from a heap. There
    gradients and an optimizer's state come to lie between activations, and what these leave is not given back. Training 135
    million parameters in float32, divided over two processes, each peaked at 2.0 GiB with this bound and at 2.8 to 3.1 GiB
    without it (five runs of either). What is mapped anew costs time, less with `use_huge_pages`: how much is within what a shared
    machine's steps vary by.

    For the whole process. It does nothing where the user set glibc's own variables, or where malloc is another one: then False.

    Source: mallopt(3).
    """
    if sys.platform != "linux":
        return False
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt(_TRIM_THRESHOLD, MAPPED_BYTES)
    mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
    return True


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def trim_heap() -> None:
    """Give the pages of malloc's heap back in which nothing lies, where they are more than 64 MiB.

    Between an optimizer's states and gradients that are made again the heap keeps what is free, and more of it from step to step:
    after four steps of 135 million parameters in float32 a process of FSDP2 (4 samples of 256 tokens) peaked at 3366 MiB, and at
    3080 MiB with this after each step; one of DDP (1 sample, recomputed) at 3177 and 2907 MiB. It takes up to 0.1 s of a step
    of seconds.

    Source: malloc_trim(3), mallinfo(3); it does nothing where malloc is not glibc's (2.33).
    """
    library = ctypes.CDLL(None)
    found, trim = getattr(library, "mallinfo2", None), getattr(library, "malloc_trim", None)
    if found is None or trim is None:
        return
    found.restype = _Mallinfo
    if found().fordblks >= _WORTH_BYTES:
        trim(0)


def use_huge_pages() -> None:
    """Have torch ask the kernel for huge pages under tensors of 2 MiB and more on the CPU: fresh memory comes 512 pages at once.

    For this process and those that it starts. torch looks when the first tensor is made; afterwards it has no effect. It gives
    way to what the user set, and does nothing where the kernel gives none.

    Source: THP_MEM_ALLOC_ENABLE in torch's alloc_cpu.cpp; madvise(2), MADV_HUGEPAGE.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
