"""Measures this machine: what its disk, its processors and its links give, in about half a minute."""

from __future__ import annotations

import datetime
import functools
import mmap
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bigmodel.checkpoint.rewritten import default_cache_folder
from bigmodel.device_map.calibration import Calibration, Link, devices_here, file_system_of
from bigmodel.device_map.processors import (
    DTYPES,
    MAIN_DTYPE,
    accelerator_rates,
    averaged,
    host_rates,
    seconds_of,
    synchronize,
)
from bigmodel.errors import InvalidArgumentError
from bigmodel.footprint import bound_product_cache
from bigmodel.progress import MEASURING, Report

__all__ = ["measure"]

_TURNS = 3
_DISK_BYTES, _DISK_S = 2 << 30, 1.0
_BLOCK_BYTES, _NUM_READERS = 8 << 20, 4
_LINK_BYTES = 256 << 20


def measure(folder: str | os.PathLike[str] | None = None, *, progress: Report | None = None) -> Calibration:
    """Measure this machine. Takes about half a minute, and 0.5 GiB of memory.

    Args:
        folder: whose disk is read; the user's cache folder if None. Large files in it are read; where there are none, a file
            of 512 MiB is written there, read, and removed.
        progress: called with (phase, done steps, steps in all).

    Raises:
        InvalidArgumentError: the folder is not there, or cannot be read.
    """
    place = Path(folder) if folder is not None else default_cache_folder()
    place = place.parent if place.is_file() else place
    if folder is None:
        place.mkdir(parents=True, exist_ok=True)
    if not place.is_dir():
        raise InvalidArgumentError(f"{place} is no folder. Give the one that holds the checkpoint.")
    bound_product_cache()  # before the first product: this process may go on to run models
    devices = devices_here()
    # In turns: what a shared machine gives changes from second to second, and a long run meets all of it.
    steps: list[tuple[str, Callable[[], Any]]] = [("host", functools.partial(host_rates, DTYPES))]
    steps += [
        ("disk", lambda: _disk_rate(place)),
        ("host", functools.partial(host_rates, (MAIN_DTYPE,))),
    ] * _TURNS
    steps += [(str(device), functools.partial(_accelerator, device)) for device in devices]
    steps.append(("links", lambda: (_all_links(devices), _between(devices))))
    found: dict[str, list[Any]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for number, (name, step) in enumerate(steps):
            if progress is not None:
                progress(MEASURING, number, len(steps))
            found.setdefault(name, []).append(step())
        if progress is not None:
            progress(MEASURING, len(steps), len(steps))
    ((together, between),) = found["links"]
    return Calibration(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        host=averaged(found["host"]),
        disks={file_system_of(place): statistics.harmonic_mean(found["disk"])},
        accelerators={str(device): found[str(device)][0] for device in devices},
        h2d_bytes_per_s_all=together,
        d2d_bytes_per_s=between,
    )


# --- Links


def _accelerator(device: torch.device) -> Link:
    return Link(rates=accelerator_rates(device), h2d_bytes_per_s=_links_rate([device]))


def _all_links(devices: Sequence[torch.device]) -> float | None:
    return _links_rate(devices) if devices else None


def _links_rate(devices: Sequence[torch.device]) -> float:
    """Bytes/s of copies from page-locked memory to all of these at once, each on a stream of its own, as weights are streamed."""
    sources = [torch.empty(_LINK_BYTES, dtype=torch.uint8).pin_memory() for _ in devices]
    targets = [torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device) for device in devices]
    streams = [torch.Stream(device) for device in devices]

    def copy() -> None:
        for source, target, stream in zip(sources, targets, streams, strict=True):
            with stream:
                target.copy_(source, non_blocking=True)
        for stream in streams:
            stream.synchronize()

    return _LINK_BYTES * len(devices) / seconds_of(copy, torch.device("cpu"))


def _between(devices: Sequence[torch.device]) -> float | None:
    if len(devices) < 2:
        return None
    source, target = (torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device) for device in devices[:2])

    def copy() -> None:
        target.copy_(source)
        synchronize(devices[0])
        synchronize(devices[1])

    return _LINK_BYTES / seconds_of(copy, torch.device("cpu"))


# --- Disk


def _disk_rate(folder: Path) -> float:
    """Bytes/s of large direct reads by a few threads, from files that are there, or one that is made for it."""
    large = sorted(
        (file for file in folder.iterdir() if file.is_file() and file.stat().st_size >= 8 * _BLOCK_BYTES), key=str
    )
    try:
        if large:
            return _read_rate(large)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibration-") as stream:
            piece = os.urandom(_BLOCK_BYTES)
            for _ in range(64):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
            return _read_rate([Path(stream.name)])
    except OSError as error:
        raise InvalidArgumentError(f"The disk of {folder} could not be measured: {error}.") from error


def _read_rate(files: Sequence[Path]) -> float:
    blocks = [
        (file, offset) for file in files for offset in range(0, file.stat().st_size - _BLOCK_BYTES + 1, _BLOCK_BYTES)
    ]
    lock, remaining, num_read, errors = (
        threading.Lock(),
        iter(blocks[: _DISK_BYTES // _BLOCK_BYTES]),
        [0],
        list[OSError](),
    )
    begin = time.perf_counter()

    def read() -> None:
        memory = mmap.mmap(-1, 2 * _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        into = memoryview(memory)[:_BLOCK_BYTES]
        while time.perf_counter() - begin < _DISK_S:
            with lock:
                block = next(remaining, None)
            if block is None:
                return
            try:
                count = _read_block(*block, into)
            except OSError as error:
                errors.append(error)
                return
            with lock:
                num_read[0] += count

    threads = [threading.Thread(target=read, name=f"bigmodel-disk-{number}") for number in range(_NUM_READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return num_read[0] / (time.perf_counter() - begin)


def _read_block(file: Path, offset: int, into: memoryview) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without direct reads: from the disk all the same
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, offset, len(into), os.POSIX_FADV_DONTNEED)
    try:
        return os.preadv(descriptor, [into], offset)
    finally:
        os.close(descriptor)
