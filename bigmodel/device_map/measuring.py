"""Measures this machine: what its disk, its processors and its links give, in some 20 seconds."""

from __future__ import annotations

import datetime
import functools
import math
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
from torch import nn
from torch.nn import functional

from bigmodel.checkpoint.rewritten import default_cache_folder
from bigmodel.device_map.calibration import Calibration, Link, devices_here, file_system_of
from bigmodel.device_map.rates import ATTENTION, COPIED, Rates
from bigmodel.device_map.tally import LARGE_BYTES, tallied
from bigmodel.errors import InvalidArgumentError
from bigmodel.footprint import bound_product_cache
from bigmodel.progress import MEASURING, Report

__all__ = ["measure"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One weight is larger than the processor's caches, and there are several: a model's weights are never there when they are used.
_WEIGHT_SHAPE, _NUM_WEIGHTS = (5504, 2048), 12
_ROWS = (1, 4, 16, 64, 256, 512)
# A head, which has many more rows than any other weight.
_HEAD_SHAPE = (32_000, 2048)
_TURNS, _REPEATS, _LONG_S = 3, 5, 0.5
_DISK_BYTES, _DISK_S = 2 << 30, 1.0
_BLOCK_BYTES, _NUM_READERS = 8 << 20, 4
_LINK_BYTES = 256 << 20


def measure(folder: str | os.PathLike[str] | None = None, *, progress: Report | None = None) -> Calibration:
    """Measure this machine. Takes some 20 seconds, and 0.5 GiB of memory.

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
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("disk", lambda: _disk_rate(place)),
        ("host", lambda: _processor_rates(torch.device("cpu"))),
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
        host=_averaged(found["host"]),
        disks={file_system_of(place): statistics.harmonic_mean(found["disk"])},
        accelerators={str(device): found[str(device)][0] for device in devices},
        h2d_bytes_per_s_all=together,
        d2d_bytes_per_s=between,
    )


# --- Processors


def _processor_rates(device: torch.device) -> Rates:
    products = {}
    for dtype in _DTYPES:
        name = str(dtype)[6:]
        for key, curve in (
            (name, _product_curve(device, dtype)),
            (name + ATTENTION, _attention_curve(device, dtype)),
            (name + COPIED, _copied_curve(device, dtype)),
        ):
            if curve is not None:
                products[key] = curve
    op_s = _operator_seconds(device)
    return Rates(
        memory_bytes_per_s=_memory_rate(device, op_s),
        products=products,
        op_s=op_s,
        fresh_bytes_per_s=_fresh_rate() if device.type == "cpu" else math.inf,
    )


def _averaged(measured: Sequence[Rates]) -> Rates:
    """The rates of work that takes, in sum, what it took in all of these."""
    first = measured[0]
    products = {
        dtype: tuple(
            (point[0], statistics.harmonic_mean([each.products[dtype][number][1] for each in measured]))
            for number, point in enumerate(curve)
        )
        for dtype, curve in first.products.items()
        if all(dtype in each.products for each in measured)
    }
    return Rates(
        memory_bytes_per_s=statistics.harmonic_mean([each.memory_bytes_per_s for each in measured]),
        products=products,
        op_s=statistics.mean([each.op_s for each in measured]),
        fresh_bytes_per_s=statistics.harmonic_mean([each.fresh_bytes_per_s for each in measured]),
    )


def _product_curve(device: torch.device, dtype: torch.dtype) -> tuple[tuple[float, float], ...] | None:
    """(FLOPs per byte, FLOP/s) of products of a few to many rows with weights that are in no cache."""
    outs, ins = _WEIGHT_SHAPE
    try:
        weights = [torch.full(_WEIGHT_SHAPE, 0.01, dtype=dtype, device=device) for _ in range(_NUM_WEIGHTS)]
        points: list[tuple[float, float]] = []
        for rows in _ROWS:
            values = torch.full((rows, ins), 0.01, dtype=dtype, device=device)
            flops = 2.0 * rows * ins * outs
            num_bytes = float(dtype.itemsize * (rows * ins + ins * outs + rows * outs))
            turns = iter(range(1 << 30))

            def product(values: torch.Tensor = values, turns: Any = turns) -> None:
                functional.linear(values, weights[next(turns) % _NUM_WEIGHTS])

            points.append((flops / num_bytes, flops / _seconds(product, device)))
    except RuntimeError:  # a dtype that this processor has no products of
        return None
    return tuple(points)


def _attention_curve(device: torch.device, dtype: torch.dtype) -> tuple[tuple[float, float], ...] | None:
    """The same for attention: of one token over a cache of 1024, and of prompts of 128 and 512."""
    points: list[tuple[float, float]] = []
    for rows, length in ((1, 1024), (128, 128), (512, 512)):
        try:
            query = torch.full((1, 16, rows, 128), 0.1, dtype=dtype, device=device)
            keys = [torch.full((1, 16, length, 128), 0.1, dtype=dtype, device=device) for _ in range(2 * _NUM_WEIGHTS)]
            turns = iter(range(1 << 30))

            def attend(query: torch.Tensor = query, keys: Any = keys, turns: Any = turns) -> None:
                key = keys[next(turns) % len(keys)]
                functional.scaled_dot_product_attention(query, key, key, is_causal=query.shape[2] > 1)

            flops = 4.0 * 16 * rows * length * 128
            num_bytes = float(dtype.itemsize * 16 * 128 * (2 * rows + 2 * length))
            points.append((flops / num_bytes, flops / _seconds(attend, device)))
        except RuntimeError:  # a dtype that this processor has no kernel for
            return None
    return tuple(sorted(points))


def _copied_curve(device: torch.device, dtype: torch.dtype) -> tuple[tuple[float, float], ...] | None:
    """The same, of one point, for a head that is given the last of many tokens: its weight is copied before the product."""
    outs, ins = _HEAD_SHAPE
    try:
        weight = torch.full(_HEAD_SHAPE, 0.01, dtype=dtype, device=device)
        last = torch.full((1, 2, ins), 0.01, dtype=dtype, device=device)[:, -1:]
        flops, num_bytes = 2.0 * ins * outs, float(dtype.itemsize * (ins + ins * outs + outs))
        return ((flops / num_bytes, flops / _seconds(lambda: functional.linear(last, weight), device)),)
    except RuntimeError:
        return None


def _fresh_rate() -> float:
    """Bytes/s of writing to memory that was just mapped, in pages of the usual size."""
    num_bytes = 4 * LARGE_BYTES
    return num_bytes / _seconds(lambda: torch.empty(num_bytes, dtype=torch.uint8).fill_(1), torch.device("cpu"))


def _memory_rate(device: torch.device, op_s: float) -> float:
    """Bytes/s of what a block does between its products, in a pass of 512 tokens: tensors that are new, and in no cache."""
    rows, width, inner, heads = 512, 2048, 5504, 16
    dtype = torch.bfloat16

    def made(*shape: int) -> list[torch.Tensor]:
        return [torch.full(shape, 0.1, dtype=dtype, device=device) for _ in range(_NUM_WEIGHTS)]

    hiddens, gates, ups = made(1, rows, width), made(1, rows, inner), made(1, rows, inner)
    turns, norm = iter(range(1 << 30)), torch.ones(width, dtype=dtype, device=device)
    angles = torch.full((1, 1, rows, width // heads), 0.1, dtype=dtype, device=device)

    def normed(hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def rotated(hidden: torch.Tensor) -> torch.Tensor:
        split = hidden.view(1, rows, heads, -1).transpose(1, 2)
        halves = split.chunk(2, dim=-1)
        return split * angles + torch.cat((-halves[1], halves[0]), dim=-1) * angles

    def run() -> None:
        turn = next(turns) % _NUM_WEIGHTS
        hidden = hiddens[turn]
        for _ in range(2):
            normed(hidden)
            rotated(hidden)
            hidden + hiddens[turn - 1]
        functional.silu(gates[turn]) * ups[turn]

    work = tallied(run)
    return work.other_bytes / max(1e-9, _seconds(run, device) - work.num_ops * op_s)


class _SmallBlock(nn.Module):
    """A transformer block as small as can be: all that it takes is what operators take beside their work."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.gate, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norms[0](hidden)
        heads = [layer(normed).view(1, -1, 2, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        rotated = [each * 0.5 + torch.cat((-each[..., 4:], each[..., :4]), dim=-1) * 0.5 for each in heads[:2]]
        mixed = functional.scaled_dot_product_attention(rotated[0], rotated[1], heads[2])
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(1, -1, 16))
        normed = self.norms[1](hidden)
        result: torch.Tensor = hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return result


def _operator_seconds(device: torch.device) -> float:
    block, hidden = _SmallBlock().to(device).eval(), torch.ones(1, 1, 16, device=device)
    work = tallied(lambda: block(hidden))
    return _seconds(lambda: [block(hidden) for _ in range(16)], device) / (16 * work.num_ops)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs, the first ones left out; fewer where one takes long."""
    times: list[float] = []
    for number in range(2 + _REPEATS):
        _synchronize(device)
        begin = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
        if number >= 1 and sum(times) > _LONG_S:
            break
    return max(1e-9, statistics.median(times[min(2, len(times) - 1) :]))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- Links


def _accelerator(device: torch.device) -> Link:
    source = torch.empty(_LINK_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    seconds = _seconds(lambda: target.copy_(source, non_blocking=True), device)
    return Link(rates=_processor_rates(device), h2d_bytes_per_s=_LINK_BYTES / seconds)


def _all_links(devices: Sequence[torch.device]) -> float | None:
    if not devices:
        return None
    sources = [torch.empty(_LINK_BYTES, dtype=torch.uint8).pin_memory() for _ in devices]
    targets = [torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device) for device in devices]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
        for device in devices:
            _synchronize(device)

    return _LINK_BYTES * len(devices) / _seconds(copy, torch.device("cpu"))


def _between(devices: Sequence[torch.device]) -> float | None:
    if len(devices) < 2:
        return None
    source, target = (torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device) for device in devices[:2])

    def copy() -> None:
        target.copy_(source)
        _synchronize(devices[0])
        _synchronize(devices[1])

    return _LINK_BYTES / _seconds(copy, torch.device("cpu"))


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
