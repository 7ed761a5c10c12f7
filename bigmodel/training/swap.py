"""A folder on a disk of this process's own, for what an engine's library keeps there: checked, measured, removed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import shutil
import socket
import statistics
import tempfile
import time
import weakref
from pathlib import Path

import torch

from bigmodel.errors import DoesNotFitError, InvalidArgumentError
from bigmodel.training.processes import Processes
from bigmodel.units import format_bytes

__all__ = ["SwapFolder", "mapped"]

_IPC_LOCK = 14  # <linux/capability.h>
_SMALL_BYTES = 1024  # what DeepSpeed's lengths and places are multiples of
_PREFIX, _LOCK = "bigmodel-swap-", "lock"
# What is written and read to learn the disk's rates, so much at a time.
_BLOCK_BYTES, _NUM_BLOCKS = 8 << 20, 8


class SwapFolder:
    """A folder in the one that was given, of this process alone.

    Attributes:
        path: of it.
        disk_bytes: that it was made for.
        read_bytes_per_s, write_bytes_per_s: of this process while all of them do the same, past the page cache.
    """

    def __init__(
        self, path: Path, disk_bytes: int, read_bytes_per_s: float, write_bytes_per_s: float, lock: int
    ) -> None:
        self.path, self.disk_bytes = path, disk_bytes
        self.read_bytes_per_s, self.write_bytes_per_s = read_bytes_per_s, write_bytes_per_s
        self._finalizer = weakref.finalize(self, _removed_by, os.getpid(), path, lock)

    @classmethod
    def make(
        cls, folder: str | os.PathLike[str], processes: Processes, *, disk_bytes: int, locked_bytes: int
    ) -> SwapFolder:
        """One for each process; all of them call it. What processes that ended otherwise left there is removed.

        Args:
            folder: made, if it is not there; each machine has its own, or they share one.
            disk_bytes: that this process will keep there.
            locked_bytes: of its buffers, which the system must let it hold in memory.

        Raises:
            InvalidArgumentError: it cannot be written to, or not past the page cache, as the library does.
            DoesNotFitError: the disk has less than the processes need that write there.
        """
        made: tuple[Path, int] | None = None
        error: BaseException | None = None
        place = Path(folder).absolute()
        needs: tuple[str, int, int, int] | None = None
        try:
            _refuse_unlocked(locked_bytes)
            place.mkdir(parents=True, exist_ok=True)
            _sweep(place)
            made = _own(place)
            free = shutil.disk_usage(place).free
            needs = socket.gethostname(), place.stat().st_dev, disk_bytes, free
        except OSError as caught:
            error = InvalidArgumentError(
                f"nvme_folder is {place}, which cannot be written to: {caught.strerror or caught}. Give a folder on a local disk."
            )
        except InvalidArgumentError as caught:
            error = caught
        rates = 0.0, 0.0
        try:
            processes.all_right(error)
            assert made is not None
            assert needs is not None
            together = sum(each[2] for each in processes.gathered(needs) if each[:2] == needs[:2])
            error = None
            if together > needs[3]:
                error = DoesNotFitError(
                    f"nvme_folder is {place}, whose disk has {format_bytes(needs[3])} free, and {format_bytes(together)} will be "
                    "kept there. Free some, give a folder on another disk, or more processes on other machines.",
                    tier="disk",
                    needed_bytes=together,
                    available_bytes=needs[3],
                )
            processes.all_right(error)
            try:
                rates = _rates(made[0])
            except OSError as caught:
                error = InvalidArgumentError(
                    f"nvme_folder is {place}, whose file system refuses to be written past the page cache (O_DIRECT: "
                    f"{caught.strerror or caught}). Give a folder on a local disk, with ext4, xfs or btrfs."
                )
            processes.all_right(error)
        except BaseException:
            if made is not None:
                _removed(*made)
            raise
        return cls(made[0], disk_bytes, *rates, made[1])


def mapped(file: str | os.PathLike[str], number: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of a file ``[number]``, on the host: what is written to them is written to it."""
    return torch.from_file(os.fspath(file), shared=True, size=number, dtype=dtype)


def _own(place: Path) -> tuple[Path, int]:
    made = Path(tempfile.mkdtemp(prefix=f"new-{_PREFIX}", dir=place))  # which nobody sweeps before it is locked
    lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return made.rename(place / made.name.removeprefix("new-")), lock


def _removed_by(process: int, path: Path, lock: int) -> None:
    if os.getpid() == process:  # not one that was forked from it
        _removed(path, lock)


def _removed(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(lock)


def _sweep(place: Path) -> None:
    """Remove folders of processes that are there no more."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its process lives
                os.close(lock)
            else:
                _removed(path, lock)


def _refuse_unlocked(locked_bytes: int) -> None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and limit < locked_bytes and not _may_lock_all():
        raise InvalidArgumentError(
            f'offloading to "nvme" locks {format_bytes(locked_bytes)} of buffers in memory, and this process may lock '
            f"{format_bytes(limit)}. Raise it (ulimit -l), or give smaller ones: sub_group_size and buffer_count in "
            "engine_options' zero_optimization."
        )


def _may_lock_all() -> bool:
    """Whether the process has CAP_IPC_LOCK, which limits do not hold for; root in a container may not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _IPC_LOCK & 1)
    return False


def _rates(folder: Path) -> tuple[float, float]:
    """Bytes per second of reads and of writes in a folder, past the page cache."""
    file = folder / "rate"
    written: list[float] = []
    read: list[float] = []
    with mmap.mmap(-1, _BLOCK_BYTES) as block:
        block.write(os.urandom(1 << 20) * (_BLOCK_BYTES >> 20))
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            for times, call in ((written, os.pwritev), (read, os.preadv)):
                for number in range(_NUM_BLOCKS):
                    started_s = time.perf_counter()
                    if call(descriptor, [block], number * _BLOCK_BYTES) != _BLOCK_BYTES:
                        raise OSError(0, "a write or read was cut short")
                    times.append(time.perf_counter() - started_s)
                with memoryview(block) as whole, whole[_SMALL_BYTES : 2 * _SMALL_BYTES] as small:
                    if call(descriptor, [small], _SMALL_BYTES) != _SMALL_BYTES:
                        raise OSError(0, f"{_SMALL_BYTES} bytes are not taken alone")
        finally:
            os.close(descriptor)
            file.unlink()
    return _BLOCK_BYTES / statistics.median(read), _BLOCK_BYTES / statistics.median(written)
