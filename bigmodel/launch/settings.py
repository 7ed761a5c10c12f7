"""What a launch is asked for, and what is detected where it is not stated."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigmodel.device_map.machine import usable_processors
from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.launch.slurm import nodes_of_slurm

__all__ = ["Detected", "LaunchSettings", "Where"]

PORT = 29400
"""Where launchers of several machines meet, unless it is stated: torchrun's."""


@dataclass(frozen=True, kw_only=True)
class Detected:
    """What a launcher has to know of its machine.

    Attributes:
        num_devices: accelerators.
        num_processors: that this process may use.
    """

    num_devices: int
    num_processors: int

    @classmethod
    def here(cls) -> Detected:
        """This machine. Accelerators are counted, and not asked for their memory: that would leave a context on each of them, for
        as long as the launcher runs."""
        import torch

        devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        return cls(num_devices=devices, num_processors=usable_processors())

    def __str__(self) -> str:
        if not self.num_devices:
            return "no accelerator, " + _counted(self.num_processors, "processor")
        return _counted(self.num_devices, "accelerator")


@dataclass(frozen=True, kw_only=True)
class Where:
    """The processes of one launcher among those of all.

    Attributes:
        num_nodes: machines, with a launcher on each.
        num_processes: that this launcher starts.
        num_threads: of operators, in each of them.
        endpoint: where the launchers meet, HOST:PORT; empty for one machine.
        is_host: whether they meet here; None where the endpoint's name says so.
        job: what tells their meeting from others at the same endpoint.
    """

    num_nodes: int
    num_processes: int
    num_threads: int
    endpoint: str = ""
    is_host: bool | None = None
    job: str = "bigmodel"


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What a launch is asked for.

    Attributes:
        num_processes: on this machine; None for one to each accelerator, or one on the processors.
        num_nodes: machines, with a launcher on each; None for those of the SLURM step, or one.
        endpoint: where launchers of several machines meet, HOST or HOST:PORT; None for the first machine of the SLURM step.
        job: name of the meeting, the same on all machines; None for SLURM's number, or "bigmodel".
        num_restarts: how often all processes are started again after one failed.
        num_threads: of operators, in each process; None for its share of the processors, unless OMP_NUM_THREADS states it.
        binds: whether a process is kept to the processors next to its memory and device, where the machine has several groups of
            them.
        grace_s: seconds that processes have to end by themselves when the launcher is told to stop.
        logs: folder in which what each process writes is kept; None keeps nothing.
    """

    num_processes: int | None = None
    num_nodes: int | None = None
    endpoint: str | None = None
    job: str | None = None
    num_restarts: int = 0
    num_threads: int | None = None
    binds: bool = True
    grace_s: int = 30
    logs: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, least in (
            *(("num_processes", 1), ("num_nodes", 1), ("num_threads", 1)),
            *(("num_restarts", 0), ("grace_s", 0)),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InvalidArgumentError(f"{name} is {shown(value)}. Give a whole number from {least} on.")
        if self.endpoint is not None:
            _with_port(self.endpoint)
        if self.job is not None and not re.fullmatch(r"[\w.-]+", self.job):
            raise InvalidArgumentError(f"job is {shown(self.job)}. Give a name of letters, digits, dots and dashes.")
        if self.logs is not None and Path(self.logs).exists() and not Path(self.logs).is_dir():
            raise InvalidArgumentError(f"logs is {shown(str(self.logs))}, which is a file. Give a folder.")

    def where(self, detected: Detected, environment: Mapping[str, str] | None = None) -> Where:
        """With what was detected.

        Args:
            detected: of this machine.
            environment: variables; this process's if None.

        Raises:
            InvalidArgumentError: there are fewer accelerators than processes, or nothing says where machines meet.
        """
        known = os.environ if environment is None else environment
        if "LOCAL_RANK" in known and "WORLD_SIZE" in known:
            raise InvalidArgumentError(
                f"This is process {known.get('RANK', known['LOCAL_RANK'])} of {known['WORLD_SIZE']} of a launcher already. Start "
                "the script itself there, or one launcher for each machine (in SLURM: --ntasks-per-node=1)."
            )
        slurm = nodes_of_slurm(known) if self.num_nodes is None and self.endpoint is None else None
        num_nodes = self.num_nodes or (1 if slurm is None else slurm.num_nodes)
        devices = detected.num_devices
        number = self.num_processes or max(1, devices)
        if devices and number > devices:
            raise InvalidArgumentError(
                f"{number} processes are asked for, and there are {devices} accelerators. Give at most one process to each."
            )
        if num_nodes > 1 and self.endpoint is None and slurm is None:
            raise InvalidArgumentError(
                f"There are {num_nodes} machines, and nothing says where they meet. Give the name or address of one of them, the "
                "same on all, such as --rdzv node0 (inside of a SLURM step it is known)."
            )
        endpoint, is_host = "", None
        if num_nodes > 1:
            endpoint = _with_port(self.endpoint) if slurm is None or self.endpoint is not None else slurm.endpoint
            is_host = None if slurm is None else slurm.is_first
        stated = known.get("OMP_NUM_THREADS", "")
        return Where(
            num_nodes=num_nodes,
            num_processes=number,
            num_threads=self.num_threads
            or (int(stated) if stated.isdecimal() and int(stated) else max(1, detected.num_processors // number)),
            endpoint=endpoint,
            is_host=is_host,
            job=self.job or ("bigmodel" if slurm is None else slurm.job),
        )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _with_port(endpoint: str | None) -> str:
    text = (endpoint or "").strip()
    host, colon, port = text.rpartition(":")
    if text.count(":") > 1 and not text.startswith("["):
        raise InvalidArgumentError(
            f"The endpoint is {shown(text)}. Write an IPv6 address in brackets: [fe80::1]:{PORT}."
        )
    if not colon or text.endswith("]"):
        host, port = text, str(PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InvalidArgumentError(f"The endpoint is {shown(text)}. Give HOST or HOST:PORT, such as node0:{PORT}.")
    return f"{host}:{port}"
