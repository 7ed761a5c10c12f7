"""The processes that train together, and this one among them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigmodel.errors import InvalidArgumentError, TrainingError

__all__ = ["Processes"]

logger = logging.getLogger("bigmodel.training")

_TIMEOUT = timedelta(minutes=30)
# A process that ended otherwise is not waited for longer.
_LEAVING = timedelta(seconds=30)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process among those of its machine.
        device: that it computes on.
        host_group: of all of them over gloo, for values on the host; None for one process.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: Any = None

    @classmethod
    def join(cls) -> Processes:
        """The processes that a launcher started (RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR are set), or this one alone.

        A process group that exists already is used, and left to whoever made it.

        Raises:
            InvalidArgumentError: what the launcher set means nothing.
        """
        size, rank, local_rank = (_setting(name, default) for name, default in _SETTINGS)
        device = _device(local_rank)
        if dist.is_initialized():
            size = dist.get_world_size()
            return cls(dist.get_rank(), size, local_rank, device, _host_group() if size > 1 else None)
        if size > 1:
            if device.type != "cpu":
                torch.accelerator.set_device_index(device.index)
            backend = dist.get_default_backend_for_device(device)
            dist.init_process_group(
                f"cpu:gloo,{device.type}:{backend}" if device.type != "cpu" else "gloo", timeout=_TIMEOUT
            )
            _leaving_group()
            atexit.register(_leave)
        return cls(rank, size, local_rank, device, _host_group() if size > 1 else None)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def mesh(self, replicas: int) -> DeviceMesh:
        """Processes that hold copies of each other's parts x processes that hold different parts.

        Alone, a process group of one is made for it.
        """
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            atexit.register(_leave)
        if self.size % replicas:
            raise InvalidArgumentError(
                f"replicas is {replicas}, and {self.size} processes do not divide into so many equal groups. Give a divisor."
            )
        shape = (replicas, self.size // replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def apart(self) -> Processes:
        """The same ones over a group of their own, for a thread that talks beside others; every process calls it."""
        return self if self.size == 1 else replace(self, host_group=dist.new_group(backend="gloo", timeout=_TIMEOUT))

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place, of a tensor on the CPU."""
        if self.size > 1:
            dist.all_reduce(values, group=self.host_group)
        return values

    def same(self, value: Any) -> Any:
        """The main process's value, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process gave, by rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.host_group)
        return found

    def wait(self) -> None:
        """For all of them to come here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def come(self, timeout: timedelta) -> None:
        """The same, within a time.

        Raises:
            RuntimeError: some did not; the message names them.
        """
        if self.size > 1:
            dist.monitored_barrier(self.host_group, timeout=timeout, wait_all_ranks=True)

    def all_right(self, error: BaseException | None) -> None:
        """After work that each process did by itself: raises everywhere where it failed anywhere."""
        failed = torch.tensor([error is not None], dtype=torch.int64)
        if self.summed(failed).item() and error is None:
            raise TrainingError("Another process failed; its message says why.")
        if error is not None:
            raise error


_SETTINGS = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))


def _setting(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise InvalidArgumentError(
            f"{name} is {text!r} in the environment. Start the script with torchrun, or unset it."
        )
    return int(text)


def _device(local_rank: int) -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise InvalidArgumentError(
            f"LOCAL_RANK is {local_rank}, and there are {count} devices of type {kind.type}. Start one process for each."
        )
    return torch.device(kind.type, local_rank)


@functools.cache
def _host_group() -> Any:
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@functools.cache
def _leaving_group() -> Any:
    """One of its own: a process that leaves must not be taken for one that came to save."""
    return dist.new_group(backend="gloo")


def _leave() -> None:
    """A group that is left while others still talk to it aborts them: all come here first.

    After an error nobody is waited for: the others would wait for this process.
    """
    if not dist.is_initialized() or hasattr(sys, "last_value"):
        return
    with contextlib.suppress(Exception):  # some of them may be gone: there is nobody left to tell
        if dist.get_world_size() > 1:
            dist.monitored_barrier(_leaving_group(), timeout=_LEAVING)
        dist.destroy_process_group()
