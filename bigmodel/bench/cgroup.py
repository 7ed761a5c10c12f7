"""A memory cgroup around one process and its page cache, version 1 or 2."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

__all__ = ["CgroupNotAllowed", "MemoryCgroup"]

_numbers = itertools.count()


class CgroupNotAllowed(Exception):
    """No memory cgroup can be made here; the message says why."""


class MemoryCgroup:
    """A child of the memory hierarchy's root, removed on leaving the ``with`` block.

    Page cache is charged to the cgroup whose process brings a page in: drop the files from the cache first, or
    what another process has cached costs this one nothing.

    Args:
        limit_bytes: memory and page cache together. Swap is not allowed on top of it, where the kernel can tell.

    Attributes:
        may_swap: whether there is swap that the limit does not hold for; known inside the ``with`` block.

    Raises:
        CgroupNotAllowed: on entering, when there is no writable memory hierarchy.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.may_swap = False
        self._folder = Path()
        self._is_v2 = False

    def __enter__(self) -> MemoryCgroup:
        root, self._is_v2 = _memory_hierarchy()
        self._folder = root / f"bigmodel-bench-{os.getpid()}-{next(_numbers)}"
        try:
            self._folder.mkdir()
        except OSError as error:
            raise CgroupNotAllowed(f"a cgroup cannot be made below {root}: {error.strerror}") from error
        try:
            if self._is_v2:
                self._write("memory.max", self.limit_bytes)
                is_held = self._write_if_there("memory.swap.max", 0)
            else:
                self._write("memory.limit_in_bytes", self.limit_bytes)
                # Fails where swap accounting is off; then there is no such file either.
                is_held = self._write_if_there("memory.memsw.limit_in_bytes", self.limit_bytes)
        except OSError as error:
            self._folder.rmdir()
            raise CgroupNotAllowed(f"the limit cannot be set in {self._folder}: {error}") from error
        self.may_swap = not is_held and _has_swap()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_v2:
            # Gives the page cache back now; a removed cgroup would keep it charged to nobody.
            self._write_if_there("memory.force_empty", 0)
        for _ in range(50):
            try:
                self._folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # a process that just ended is not gone yet
                time.sleep(0.1)
        raise RuntimeError(f"{self._folder} cannot be removed: a process is still in it. End it, then rmdir it.")

    def command(self, argv: list[str]) -> list[str]:
        """`argv`, started inside the cgroup (its first page included) with its process id unchanged by the wrapper."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs"), *argv]

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged, page cache included; None before Linux 5.19 with version 2, which does not keep it."""
        try:
            return int(self._read("memory.peak" if self._is_v2 else "memory.max_usage_in_bytes"))
        except FileNotFoundError:
            return None

    @property
    def num_oom_kills(self) -> int:
        """Processes that the kernel killed for this limit."""
        lines = self._read("memory.events" if self._is_v2 else "memory.oom_control").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def _write(self, file: str, value: int) -> None:
        (self._folder / file).write_text(str(value))

    def _write_if_there(self, file: str, value: int) -> bool:
        """Whether it was written."""
        try:
            if (self._folder / file).exists():
                self._write(file, value)
                return True
        except OSError:
            pass
        return False

    def _read(self, file: str) -> str:
        return (self._folder / file).read_text()


def _has_swap() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1  # below its heading


def _memory_hierarchy() -> tuple[Path, bool]:
    """The mount point of the memory controller, and whether it is version 2."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4])
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup" and "memory" in options.split(","):
            return point, False
        if kind == "cgroup2":
            enabled = point / "cgroup.subtree_control"
            if enabled.exists() and "memory" in enabled.read_text().split():
                return point, True
    raise CgroupNotAllowed("no memory controller is mounted")
