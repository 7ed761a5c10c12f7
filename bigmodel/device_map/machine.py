"""The machine that a plan is for: how much of each tier is free, as this process may use it, and how fast everything is."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bigmodel.checks import own_device_name, parse_json
from bigmodel.device_map import calibration
from bigmodel.device_map.control_groups import ControlGroups
from bigmodel.device_map.machine_fields import check_machine
from bigmodel.device_map.measuring import measure
from bigmodel.device_map.rates import Rates
from bigmodel.errors import InvalidArgumentError, reason, shown
from bigmodel.progress import Report, progress_bar
from bigmodel.units import GIB, parse_bytes

__all__ = ["DEFAULT_RATES", "OTHER_DISK", "SHIPPED", "Accelerator", "Machine", "usable_processors"]

# What is left to others of a tier whose limit nobody stated.
_SPARE_BYTES, _SPARE_FRACTION = GIB, 0.05

# Rates that nobody measured or stated: a desktop of 2023 with one 24 GB card. Its plans are right in what fits where; their
# times are guesses, and `explain` says so.
DEFAULT_RATES = "defaults"
_HOST_RATES = Rates.roofline(
    30e9, {"float32": 0.4e12, "bfloat16": 0.6e12, "float16": 0.4e12, "int8": 0.8e12}, op_s=6e-6
)
_ACCELERATOR_RATES = Rates.roofline(
    800e9, {"float32": 40e12, "bfloat16": 120e12, "float16": 120e12, "int8": 240e12}, op_s=6e-6
)
_H2D_BYTES_PER_S, _D2D_BYTES_PER_S, _DISK_BYTES_PER_S = 20e9, 20e9, 2.5e9
OTHER_DISK = ", the disk's rate is another disk's"
"""What `rates_from` ends with where the disk that is read was not among those measured."""

SHIPPED = Path(__file__).parent / "machines"
"""Machine files of hardware that one may not own; `Machine.load` takes their names without the suffix too."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator.

    Attributes:
        device: torch's device string, such as ``"cuda:0"``.
        name: what its maker calls it.
        memory_bytes: free bytes, and what this process already holds there.
        rates: of its memory and arithmetic.
        h2d_bytes_per_s: from page-locked host memory, when no other link is busy.
        is_unified: it uses the host's memory: the two are one tier, and nothing is copied.
    """

    device: str
    name: str
    memory_bytes: int
    rates: Rates = _ACCELERATOR_RATES
    h2d_bytes_per_s: float = _H2D_BYTES_PER_S
    is_unified: bool = False

    def __post_init__(self) -> None:
        # torch has two names for the first of a kind: "cuda" is "cuda:0".
        object.__setattr__(self, "device", own_device_name(self.device) or self.device)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to plan with. Pure data: `probe` measures it here, `load` reads one that is somewhere else.

    Attributes:
        name: for tables.
        host_bytes: free host memory, within the limits of this process's control groups.
        num_processors: that this process may use.
        disk_bytes: free bytes of the file system that is written to.
        accelerators: in order of index.
        num_sharing: processes of this job on this machine; unstated limits are divided among them.
        place: of this process among them, from 0; the accelerators of its place are its own where no limit is stated.
        host_rates: of host memory and the processors' arithmetic.
        disk_read_bytes_per_s: of large reads from where the checkpoint is.
        disks: file system -> the same, for those that were measured.
        h2d_bytes_per_s_all: of all links to accelerators together; infinite where they do not slow each other down.
        d2d_bytes_per_s: from one accelerator to another.
        rates_from: where the rates come from: ``"defaults"``, a date, or a machine file's name; and if the disk's is
            another disk's.
    """

    name: str
    host_bytes: int
    num_processors: int
    disk_bytes: int
    accelerators: tuple[Accelerator, ...] = ()
    num_sharing: int = 1
    place: int = 0
    host_rates: Rates = _HOST_RATES
    disk_read_bytes_per_s: float = _DISK_BYTES_PER_S
    disks: Mapping[str, float] = field(default_factory=dict)
    h2d_bytes_per_s_all: float = math.inf
    d2d_bytes_per_s: float = _D2D_BYTES_PER_S
    rates_from: str = DEFAULT_RATES

    def __post_init__(self) -> None:
        rates = [each.h2d_bytes_per_s for each in self.accelerators]
        rates += [self.disk_read_bytes_per_s, self.h2d_bytes_per_s_all, self.d2d_bytes_per_s, *self.disks.values()]
        if not all(rate > 0 for rate in rates):  # also for NaN
            raise InvalidArgumentError(f"A rate of machine {self.name!r} is not positive: {rates}.")
        devices = [each.device for each in self.accelerators]
        if len(set(devices)) < len(devices) or not all(map(own_device_name, devices)):
            raise InvalidArgumentError(
                f"Machine {self.name!r} has the accelerators {devices}. Give each a device of its own, such as 'cuda:0'."
            )

    @classmethod
    def probe(cls, folder: str | os.PathLike[str] | None = None, *, root: str | os.PathLike[str] = "/") -> Machine:
        """This machine, now; with the rates that `calibrate` kept, or defaults.

        Args:
            folder: where would be written; the user's home if None.
            root: where /proc and /sys are looked for.
        """
        import psutil

        groups = ControlGroups(Path(root))
        host = max(0, min([psutil.virtual_memory().available, *groups.free_memory_bytes()]))
        machine = cls(
            name=os.uname().nodename,
            host_bytes=host,
            num_processors=usable_processors(root),
            disk_bytes=_free_disk_bytes(Path(folder) if folder is not None else Path.home()),
            accelerators=_probe_accelerators(host),
            num_sharing=_launched("LOCAL_WORLD_SIZE", 1),
            place=_launched("LOCAL_RANK", 0),
        )
        known = calibration.kept()
        return machine if known is None else machine._with(known)

    @classmethod
    def calibrate(
        cls, folder: str | os.PathLike[str] | None = None, *, progress: bool | Report | None = None
    ) -> Machine:
        """Measure this machine's rates, and keep them in the user's cache folder, where `probe` finds them.

        Takes about a minute and 0.5 GiB of memory; the machine should be idle.

        Args:
            folder: that holds checkpoints: its disk is what is measured; the user's cache folder if None.
            progress: True, False, None (bars where stderr is a terminal), or a callable ``(phase, done steps, steps in all)``.

        Returns:
            What `probe` gives from now on.

        Raises:
            InvalidArgumentError: the folder is not there, or cannot be read or written.
        """
        calibration.refuse_unwritable()
        with progress_bar(progress) as report:
            measured = measure(folder, progress=report)
        calibration.keep(measured)
        return cls.probe().reading_from(folder) if folder is not None else cls.probe()

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Machine:
        """A machine described in a JSON file.

        Args:
            file: or the name of one that comes with bigmodel (see `SHIPPED`). ``{"name", "accelerators": [{"name", "memory",
                "memory_bytes_per_s", "flops_per_s": {"bfloat16": ...}, "h2d_bytes_per_s"}], "host": {"memory",
                "memory_bytes_per_s", "flops_per_s"}, "disk": {"free", "read_bytes_per_s"}, "h2d_bytes_per_s_all"}``. Sizes
                are strings with a unit, or bytes; rates bytes/s and FLOP/s. What is left out has the default of this module;
                only the host's memory must be there. An accelerator may state its ``"device"`` and ``"unified": true``, the
                host its ``"processors"``.

        Raises:
            InvalidArgumentError: it is not such a file.
        """
        if not isinstance(file, (str, os.PathLike)):
            raise InvalidArgumentError(f"file is {shown(file)}. Give a machine file, or the name of one: {_names()}.")
        try:
            place = Path(file)
            if not place.exists() and (SHIPPED / f"{file}.json").exists():
                place = SHIPPED / f"{file}.json"
            if not place.exists():
                raise FileNotFoundError("there is no such file")
            described = parse_json(place.read_text(), "the text")
            check_machine(described)
            host, disk, together = described["host"], described.get("disk", {}), described.get("h2d_bytes_per_s_all")
            accelerators = tuple(
                Accelerator(
                    device=each.get("device", f"cuda:{index}"),
                    name=each.get("name", "accelerator"),
                    memory_bytes=parse_bytes(each["memory"]),
                    rates=Rates.from_json(each, _ACCELERATOR_RATES),
                    h2d_bytes_per_s=float(each.get("h2d_bytes_per_s", _H2D_BYTES_PER_S)),
                    is_unified=each.get("unified", False),
                )
                for index, each in enumerate(described.get("accelerators", ()))
            )
            return cls(
                name=described.get("name", place.stem),
                host_bytes=parse_bytes(host["memory"]),
                num_processors=host.get("processors", 1),
                disk_bytes=parse_bytes(disk.get("free", 0)),
                accelerators=accelerators,
                num_sharing=described.get("processes", 1),
                place=described.get("place", 0),
                host_rates=Rates.from_json(host, _HOST_RATES),
                disk_read_bytes_per_s=float(disk.get("read_bytes_per_s", _DISK_BYTES_PER_S)),
                disks={name: float(rate) for name, rate in disk.get("measured", {}).items()},
                h2d_bytes_per_s_all=math.inf if together is None else float(together),
                d2d_bytes_per_s=float(described.get("d2d_bytes_per_s", _D2D_BYTES_PER_S)),
                rates_from=described.get("rates_from", place.name),
            )
        except (OSError, ValueError, TypeError) as error:
            raise InvalidArgumentError(
                f"{_cut(os.fspath(file))}: {reason(error)}. A machine file needs at least "
                f'{{"host": {{"memory": "64GiB"}}}}; machines that come with bigmodel are {_names()}.'
            ) from error

    def to_json(self) -> str:
        """The machine as a machine file; `load` reads it back equal, on any other machine."""
        described = {
            "name": self.name,
            "rates_from": self.rates_from,
            "accelerators": [
                {"name": each.name, "device": each.device, "memory": each.memory_bytes, "unified": each.is_unified}
                | each.rates.to_json()
                | {"h2d_bytes_per_s": each.h2d_bytes_per_s}
                for each in self.accelerators
            ],
            "host": {"memory": self.host_bytes, "processors": self.num_processors} | self.host_rates.to_json(),
            "disk": {
                "free": self.disk_bytes,
                "read_bytes_per_s": self.disk_read_bytes_per_s,
                "measured": dict(self.disks),
            },
            # JSON has no infinity
            "h2d_bytes_per_s_all": None if math.isinf(self.h2d_bytes_per_s_all) else self.h2d_bytes_per_s_all,
            "d2d_bytes_per_s": self.d2d_bytes_per_s,
            "processes": self.num_sharing,
            "place": self.place,
        }
        return json.dumps(described, indent=1)

    def reading_from(self, folder: str | os.PathLike[str]) -> Machine:
        """The same machine, with the rate of the disk that holds the folder; `rates_from` tells where that was not measured."""
        if not self.disks:
            return self
        rates_from = self.rates_from.removesuffix(OTHER_DISK)
        rate = self.disks.get(calibration.file_system_of(folder))
        if rate is None:
            return replace(self, rates_from=rates_from + OTHER_DISK)
        return replace(self, disk_read_bytes_per_s=rate, rates_from=rates_from)

    def rates_of(self, device: str) -> Rates:
        """Of the host's processors ("cpu") or of an accelerator.

        Raises:
            KeyError: the machine has no such device.
        """
        if device == "cpu":
            return self.host_rates
        return {each.device: each.rates for each in self.accelerators}[device]

    def kind_of(self, tier: str, limit: float) -> str:
        """Equal for tiers that differ in nothing but their name, where they have the same limit."""
        for each in self.accelerators:
            if each.device == tier:
                return repr((limit, each.name, each.rates.to_json(), each.h2d_bytes_per_s, each.is_unified))
        return tier

    @property
    def own_accelerators(self) -> tuple[Accelerator, ...]:
        """Those of this process's place: an equal part in order, or one that others use too, where there are fewer of them."""
        count, sharing = len(self.accelerators), max(1, self.num_sharing)
        if count < sharing:
            return self.accelerators[self.place % count :][:1] if count else ()
        place = self.place % sharing
        return self.accelerators[place * count // sharing : (place + 1) * count // sharing]

    def unstated_limit_bytes(self, tier: str) -> int:
        """What may be used of a tier whose limit nobody stated: this process's share of what is free, less a reserve.

        Args:
            tier: ``"cpu"``, ``"disk"``, or an accelerator's device string.
        """
        if tier not in ("cpu", "disk"):
            num_on_it = max(1, -(-self.num_sharing // max(1, len(self.accelerators))))
            found = next((each.memory_bytes for each in self.accelerators if each.device == tier), 0)
            return _less_spare(found) // num_on_it
        free = self.host_bytes if tier == "cpu" else self.disk_bytes
        return _less_spare(free) // self.num_sharing

    def _with(self, known: calibration.Calibration) -> Machine:
        """This machine with measured rates."""
        accelerators = tuple(
            replace(each, rates=link.rates, h2d_bytes_per_s=link.h2d_bytes_per_s)
            if (link := known.accelerators.get(each.device)) is not None
            else each
            for each in self.accelerators
        )
        # Of several disks the slowest, until it is known which one is read.
        disk = min(known.disks.values(), default=_DISK_BYTES_PER_S)
        return replace(
            self,
            accelerators=accelerators,
            host_rates=known.host,
            disk_read_bytes_per_s=disk,
            disks=known.disks,
            h2d_bytes_per_s_all=known.h2d_bytes_per_s_all or math.inf,
            d2d_bytes_per_s=known.d2d_bytes_per_s or _D2D_BYTES_PER_S,
            rates_from=f"measured {known.date[:10]}",
        )


def usable_processors(root: str | os.PathLike[str] = "/") -> int:
    """Processors that this process may use: its affinity's, and no more than its control groups' quotas amount to.

    Args:
        root: where /proc and /sys are looked for.
    """
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *ControlGroups(Path(root)).processors()])))


def _names() -> str:
    return ", ".join(sorted(each.stem for each in SHIPPED.glob("*.json")))


def _cut(path: object, most: int = 300) -> str:
    return str(path) if len(str(path)) <= most else f"{str(path)[:most]}..."


def _launched(name: str, least: int) -> int:
    """What a launcher says of this process; the least where there is none."""
    text = os.environ.get(name, "")
    return max(least, int(text)) if text.isdecimal() else least


def _less_spare(free: int) -> int:
    return max(0, free - max(_SPARE_BYTES, int(free * _SPARE_FRACTION)))


def _free_disk_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _probe_accelerators(host_bytes: int) -> tuple[Accelerator, ...]:
    if not torch.accelerator.is_available():
        return ()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    backend: Any = getattr(torch, kind.type)
    found = []
    for index in range(torch.accelerator.device_count()):
        properties = backend.get_device_properties(index) if hasattr(backend, "get_device_properties") else None
        is_unified = kind.type == "mps" or bool(getattr(properties, "is_integrated", False))
        free = 0
        with contextlib.suppress(RuntimeError):  # CUDA's, where others have left no room for a context
            free = backend.mem_get_info(index)[0] if hasattr(backend, "mem_get_info") else 0
        held = backend.memory_reserved(index) if hasattr(backend, "memory_reserved") else 0
        name = backend.get_device_name(index) if hasattr(backend, "get_device_name") else kind.type
        found.append(
            Accelerator(
                device=f"{kind.type}:{index}",
                name=name,
                memory_bytes=min(free + held, host_bytes)
                if is_unified and free
                else host_bytes
                if is_unified
                else free + held,
                is_unified=is_unified,
            )
        )
    return tuple(found)
