"""The machine that a plan is for: how much of each tier is free, as this process may use it."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigmodel.errors import InvalidArgumentError
from bigmodel.units import GIB, parse_bytes

__all__ = ["Accelerator", "Machine"]

# What is left to others of a tier whose limit nobody stated.
_SPARE_BYTES, _SPARE_FRACTION = GIB, 0.05


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator.

    Attributes:
        device: torch's device string, such as ``"cuda:0"``.
        name: what its maker calls it.
        memory_bytes: free bytes, and what this process already holds there.
    """

    device: str
    name: str
    memory_bytes: int


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
    """

    name: str
    host_bytes: int
    num_processors: int
    disk_bytes: int
    accelerators: tuple[Accelerator, ...] = ()
    num_sharing: int = 1

    @classmethod
    def probe(cls, folder: str | os.PathLike[str] | None = None, *, root: str | os.PathLike[str] = "/") -> Machine:
        """This machine, now.

        Args:
            folder: where would be written; the user's home if None.
            root: where /proc and /sys are looked for.
        """
        import psutil

        groups = _ControlGroups(Path(root))
        host = min([psutil.virtual_memory().available, *groups.free_memory_bytes()])
        return cls(
            name=os.uname().nodename,
            host_bytes=max(0, host),
            num_processors=max(1, math.floor(min([len(os.sched_getaffinity(0)), *groups.processors()]))),
            disk_bytes=_free_disk_bytes(Path(folder) if folder is not None else Path.home()),
            accelerators=_probe_accelerators(),
            num_sharing=_num_local_processes(),
        )

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Machine:
        """A machine described in a JSON file.

        Args:
            file: ``{"name", "accelerators": [{"name", "memory"}], "host": {"memory"}, "disk": {"free"}}``; sizes as strings
                with a unit, or bytes. An accelerator may state its ``"device"``, the host its ``"processors"``.

        Raises:
            InvalidArgumentError: it is not such a file.
        """
        try:
            described = json.loads(Path(file).read_text())
            accelerators = tuple(
                Accelerator(
                    device=str(each.get("device", f"cuda:{index}")),
                    name=str(each.get("name", "accelerator")),
                    memory_bytes=parse_bytes(each["memory"], f"memory of accelerator {index}"),
                )
                for index, each in enumerate(described.get("accelerators", ()))
            )
            return cls(
                name=str(described.get("name", Path(file).stem)),
                host_bytes=parse_bytes(described["host"]["memory"], "host.memory"),
                num_processors=int(described["host"].get("processors", 1)),
                disk_bytes=parse_bytes(described.get("disk", {}).get("free", 0), "disk.free"),
                accelerators=accelerators,
                num_sharing=int(described.get("processes", 1)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(
                f"{os.fspath(file)} does not describe a machine ({type(error).__name__}: {error}). It needs at least "
                '{"host": {"memory": "64GiB"}}.'
            ) from error

    def to_json(self) -> str:
        """The machine as a machine file; `load` reads it back equal, on any other machine."""
        described = {
            "name": self.name,
            "accelerators": [
                {"name": each.name, "device": each.device, "memory": each.memory_bytes} for each in self.accelerators
            ],
            "host": {"memory": self.host_bytes, "processors": self.num_processors},
            "disk": {"free": self.disk_bytes},
            "processes": self.num_sharing,
        }
        return json.dumps(described, indent=1)

    def unstated_limit_bytes(self, tier: str) -> int:
        """What may be used of a tier whose limit nobody stated: this process's share of what is free, less a reserve.

        Args:
            tier: ``"cpu"``, ``"disk"``, or an accelerator's device string.
        """
        if tier not in ("cpu", "disk"):
            return _less_spare(next((each.memory_bytes for each in self.accelerators if each.device == tier), 0))
        free = self.host_bytes if tier == "cpu" else self.disk_bytes
        return _less_spare(free) // self.num_sharing


def _num_local_processes() -> int:
    """Processes of a launcher's job on this machine; 1 where no launcher says otherwise."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


def _less_spare(free: int) -> int:
    return max(0, free - max(_SPARE_BYTES, int(free * _SPARE_FRACTION)))


def _free_disk_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _probe_accelerators() -> tuple[Accelerator, ...]:
    if not torch.accelerator.is_available():
        return ()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    backend: Any = getattr(torch, kind.type)
    found = []
    for index in range(torch.accelerator.device_count()):
        free = backend.mem_get_info(index)[0] if hasattr(backend, "mem_get_info") else 0
        held = backend.memory_reserved(index) if hasattr(backend, "memory_reserved") else 0
        name = backend.get_device_name(index) if hasattr(backend, "get_device_name") else kind.type
        found.append(Accelerator(device=f"{kind.type}:{index}", name=name, memory_bytes=free + held))
    return tuple(found)


class _ControlGroups:
    """The limits of this process's control groups and of all groups above them, of both versions."""

    def __init__(self, root: Path) -> None:
        self._mounts = root / "sys/fs/cgroup"
        self._paths: dict[str, str] = {}
        try:
            lines = (root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            for controller in controllers.split(","):
                self._paths[controller] = path

    def free_memory_bytes(self) -> list[int]:
        """Per limited group: its limit less what is used, page cache that can be dropped not counted as used."""
        free = []
        for folder in self._folders("memory"):
            limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
            if limit is None or limit >= 1 << 60:
                continue
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            free.append(max(0, limit - max(0, used - _reclaimable(folder / "memory.stat"))))
        return free

    def processors(self) -> list[float]:
        """Per limited group: processors that its quota amounts to."""
        found = []
        for folder in self._folders("cpu"):
            try:
                quota, period = (folder / "cpu.max").read_text().split()
            except (OSError, ValueError):
                quota = str(_number(folder / "cpu.cfs_quota_us") or "max")
                period = str(_number(folder / "cpu.cfs_period_us") or 100_000)
            if quota != "max" and int(quota) > 0:
                found.append(int(quota) / int(period))
        return found

    def _folders(self, controller: str) -> list[Path]:
        """The group's folder and those above it, up to the mount; the mount alone where the path is another namespace's."""
        mount = self._mounts / controller if (self._mounts / controller).is_dir() else self._mounts
        path = self._paths.get(controller, self._paths.get("", "/")).strip("/")
        folder = mount / path
        if not folder.is_dir():
            return [mount]
        folders = [folder]
        while folder != mount:
            folder = folder.parent
            folders.append(folder)
        return folders


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.lstrip("-").isdigit() else None


def _reclaimable(stat: Path) -> int:
    """Bytes of file pages in a group's memory.stat; a v1 group's own totals include the groups below it."""
    try:
        pairs = (line.split() for line in stat.read_text().splitlines())
        fields = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except OSError:
        return 0
    prefix = "total_" if "total_inactive_file" in fields else ""
    return sum(fields.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
