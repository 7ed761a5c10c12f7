"""The rates of this machine, kept: disk, memory, products, links.

    measuring.measure() ──> Calibration ──> the user's cache folder ──> Machine.probe()

A calibration is kept for this machine's processors, accelerators, number of threads and version of torch, and used until another
takes its place.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bigmodel.checkpoint.rewritten import default_cache_folder
from bigmodel.checks import Check, integer, mapped, number, parse_json, record, text
from bigmodel.device_map.rates import PER_S, RATE_FIELDS, Rates
from bigmodel.errors import InvalidArgumentError

__all__ = ["Calibration", "Link", "devices_here", "file_system_of", "keep", "kept", "refuse_unwritable"]

logger = logging.getLogger("bigmodel.device_map")

_VERSION = 1
_MOST_BYTES = 16 << 20  # of a file
_LOCK = ".calibration.lock"


@dataclass(frozen=True, kw_only=True)
class Link:
    """An accelerator's rates, and its link's to the host.

    Attributes:
        rates: of the accelerator.
        h2d_bytes_per_s: from page-locked host memory.
    """

    rates: Rates
    h2d_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured rates.

    Attributes:
        date: when, ISO 8601.
        versions: of torch and Python.
        host: of the processors.
        disks: file system -> bytes/s of large direct reads.
        accelerators: device -> rates.
        h2d_bytes_per_s_all: of all links at once; None without accelerators.
        d2d_bytes_per_s: from one accelerator to another; None where there are no two.
    """

    date: str
    versions: Mapping[str, str]
    host: Rates
    disks: Mapping[str, float] = field(default_factory=dict)
    accelerators: Mapping[str, Link] = field(default_factory=dict)
    h2d_bytes_per_s_all: float | None = None
    d2d_bytes_per_s: float | None = None


def keep(calibration: Calibration, folder: Path | None = None) -> Path:
    """Write a calibration where `kept` finds it; the disks of an earlier one that were not measured again stay.

    Returns:
        The file.

    Raises:
        InvalidArgumentError: it cannot be written there.
    """
    file = _file(folder)
    with _told(file.parent), _locked(file.parent):
        earlier = kept(folder)
        if earlier is not None:
            calibration = replace(calibration, disks={**earlier.disks, **calibration.disks})
        _write(file, json.dumps({"version": _VERSION} | _to_json(calibration), indent=1))
    return file


def kept(folder: Path | None = None) -> Calibration | None:
    """What was measured on this machine before; None where nothing was, or what is kept cannot be read, which is logged."""
    file = _file(folder)
    try:
        if not file.exists():
            return None
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:  # a pipe would never end
            raise InvalidArgumentError("it is no file of a calibration's size")
        described = parse_json(file.read_text(), "it")
        _check_file(described, "")
        return _from_json(described)
    except (OSError, ValueError) as error:
        _warn_once(file, str(error).rstrip("."))
        return None


def refuse_unwritable(folder: Path | None = None) -> None:
    """InvalidArgumentError where `keep` could not write: told before a minute of measuring."""
    file = _file(folder)
    with _told(file.parent), _locked(file.parent):
        if file.is_dir():
            raise IsADirectoryError(f"{file.name} is a folder")
        with tempfile.NamedTemporaryFile(dir=file.parent):
            pass


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What goes wrong with the folder's files, as an error about it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"Rates are kept in {folder}, which cannot be written: {error}. Mend that, or set XDG_CACHE_HOME to the "
            "full path of a folder that can."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and one process of all that come here wait for the other: each reads what the one before wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(file: Path, text: str) -> None:
    """The file is there whole or as before."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as stream:
        try:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise


@functools.cache
def _warn_once(file: Path, reason: str) -> None:
    logger.warning("The rates in %s are not used: %s. Run `bigmodel calibrate` to measure them again.", file, reason)


def file_system_of(path: str | os.PathLike[str]) -> str:
    """What tells a file system from others on this machine: its source and type, as mounted."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    device = os.stat(place).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            columns, _, rest = line.partition(" - ")
            if columns.split()[2] == wanted:
                kind, source = rest.split()[:2]
                return f"{source} ({kind})"
    except (OSError, ValueError, IndexError):
        pass
    return wanted


def _file(folder: Path | None) -> Path:
    """One for each set of processors, accelerators and threads, as a cache folder may be shared; and for each torch, whose
    kernels are what was measured."""
    names = [_device_name(device) for device in devices_here()]
    threads = torch.get_num_threads()
    described = [platform.machine(), _processor_name(), os.cpu_count(), threads, torch.__version__, names]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    return (folder or default_cache_folder()) / f"calibration-{key}.json"


def _to_json(calibration: Calibration) -> dict[str, Any]:
    return {
        "date": calibration.date,
        "versions": dict(calibration.versions),
        "host": calibration.host.to_json(),
        "disks": dict(calibration.disks),
        "accelerators": {
            device: link.rates.to_json() | {"h2d_bytes_per_s": link.h2d_bytes_per_s}
            for device, link in calibration.accelerators.items()
        },
        "h2d_bytes_per_s_all": calibration.h2d_bytes_per_s_all,
        "d2d_bytes_per_s": calibration.d2d_bytes_per_s,
    }


def _from_json(described: Mapping[str, Any]) -> Calibration:
    nothing = Rates(memory_bytes_per_s=1.0, products={}, op_s=0.0)
    return Calibration(
        date=described["date"],
        versions=dict(described["versions"]),
        host=Rates.from_json(described["host"], nothing),
        disks={name: float(rate) for name, rate in described["disks"].items()},
        accelerators={
            device: Link(rates=Rates.from_json(each, nothing), h2d_bytes_per_s=float(each["h2d_bytes_per_s"]))
            for device, each in described["accelerators"].items()
        },
        h2d_bytes_per_s_all=described["h2d_bytes_per_s_all"],
        d2d_bytes_per_s=described["d2d_bytes_per_s"],
    )


_HOST_NEEDED = ("memory_bytes_per_s", "products", "op_s")
_FIELDS: dict[str, Check] = {
    "version": integer(_VERSION, _VERSION),
    "date": text,
    "versions": mapped(text),
    "host": record(RATE_FIELDS, needed=_HOST_NEEDED),
    "disks": mapped(PER_S),
    "accelerators": mapped(
        record({**RATE_FIELDS, "h2d_bytes_per_s": PER_S}, needed=(*_HOST_NEEDED, "h2d_bytes_per_s"))
    ),
    "h2d_bytes_per_s_all": number(1e3, 1e18, or_none=True),
    "d2d_bytes_per_s": number(1e3, 1e18, or_none=True),
}
_check_file = record(_FIELDS, needed=_FIELDS)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def devices_here() -> list[torch.device]:
    """This machine's accelerators, in order of index."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def _device_name(device: torch.device) -> str:
    backend: Any = getattr(torch, device.type)
    return str(backend.get_device_name(device.index)) if hasattr(backend, "get_device_name") else device.type
