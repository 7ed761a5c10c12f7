"""What carries gradients between processes: the model whole in each, or its parts divided over them. The libraries' own."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bigmodel.errors import InvalidArgumentError
from bigmodel.progress import Report
from bigmodel.training.config import PRECISIONS, TrainingConfig
from bigmodel.training.processes import Processes
from bigmodel.training.weights import Origin, with_masters

__all__ = ["Engine", "engine_of"]


class Engine(ABC):
    """A model in the hands of a library.

    Attributes:
        model: what is called.
        module: the user's, with the user's names.
        num_averaged: processes over whose gradients the library takes the mean.
        num_copies: processes that hold each part.
    """

    model: nn.Module
    module: nn.Module
    num_averaged: int
    num_copies: int

    @abstractmethod
    def syncing(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are reduced in the last one alone."""

    def rest(self) -> None:  # noqa: B027  # most have nothing to do
        """Between passes: the module's parameters are the masters, and not copies to compute with."""

    @abstractmethod
    def describe(self) -> str:
        """One line."""


class _Plain(Engine):
    """The model whole, in float32; with several processes DDP reduces its gradients."""

    def __init__(self, origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None) -> None:
        with_masters(origin.module)
        _refuse_narrow(origin.module)
        origin.fill(processes.device, progress)
        self.module = self.model = origin.module.to(processes.device)
        self.num_averaged = self.num_copies = processes.size
        if processes.size > 1:
            devices = [processes.device] if processes.device.type != "cpu" else None
            unused = config.find_unused_parameters
            self.model = DistributedDataParallel(self.module, device_ids=devices, find_unused_parameters=unused)

    @contextlib.contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        ddp = self.model
        with ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not is_last else contextlib.nullcontext():
            yield

    def describe(self) -> str:
        return "DistributedDataParallel, float32" if self.num_copies > 1 else "one process, float32"


class _Sharded(Engine):
    """FSDP2: each unit's parameters are divided over the processes of a mesh, or held whole by each for their masters' sake."""

    def __init__(
        self, origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None, *, replicas: int
    ) -> None:
        self.module = self.model = origin.module
        with_masters(origin.module)
        mesh = processes.mesh(replicas)
        dtype = PRECISIONS[config.precision]
        if dtype == torch.float32:
            _refuse_narrow(origin.module)
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=PRECISIONS[config.reduce_dtype or "fp32"],
        )
        options: dict[str, Any] = {
            "mesh": mesh if replicas > 1 or processes.size == 1 else mesh["shard"],
            "mp_policy": policy,
            "reshard_after_forward": config.reshard_after_forward and processes.size > replicas,
        }
        scalars = {each for each in origin.module.parameters() if not each.ndim}
        if scalars and processes.size > 1:
            names = [name for name, each in origin.module.named_parameters() if each in scalars]
            raise InvalidArgumentError(
                f'{len(names)} parameters are scalars, such as {names[0]}, which FSDP2 does not divide. Give strategy="ddp" with '
                'strategy="ddp" with precision="fp32".'
            )
        options["ignored_params"] = scalars
        groups = origin.groups()
        for module in groups:
            fully_shard(module, **options)
        fully_shard(origin.module, **options)
        origin.fill(processes.device, progress)
        self.num_averaged, self.num_copies = processes.size, replicas
        self._num_groups, self._precision, self._num_parts = (
            len(groups) + 1,
            config.precision,
            processes.size // replicas,
        )

    @contextlib.contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        root = self.model
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(is_last)
        root.set_is_last_backward(is_last)
        yield

    def rest(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def describe(self) -> str:
        parts = f"{self._num_groups} groups, {self._num_parts} parts, {self.num_copies} copies of each"
        return f"FSDP2, {self._precision}, {parts}"


def _refuse_narrow(module: nn.Module) -> None:
    """InvalidArgumentError for frozen parameters that float32 does not compute with."""
    narrow = [name for name, each in module.named_parameters() if each.is_floating_point() and each.itemsize < 4]
    if narrow:
        raise InvalidArgumentError(
            f'precision is "fp32", and {len(narrow)} frozen parameters are narrower, such as {narrow[0]}. Give '
            'precision="bf16", or call .float() on them.'
        )


Make = Callable[[Origin, TrainingConfig, Processes, "Report | None"], Engine]


def engine_of(config: TrainingConfig, processes: Processes) -> Make:
    """What carries out a configuration here.

    Raises:
        InvalidArgumentError: it cannot be had here: why, and what can.
    """
    strategy = config.strategy
    if strategy == "auto":
        strategy = "single" if processes.size == 1 else "fsdp"
    if strategy == "single" and processes.size > 1:
        raise InvalidArgumentError(
            f'strategy is "single", and {processes.size} processes were started. Start one, or give "ddp" or "fsdp".'
        )
    is_sharded = strategy == "fsdp" or config.precision != "fp32"
    for name, default in (("reduce_dtype", None), ("reshard_after_forward", True)):
        if getattr(config, name) != default and not (is_sharded if name == "reduce_dtype" else strategy == "fsdp"):
            raise InvalidArgumentError(
                f'{name} is {getattr(config, name)!r}, which strategy="{strategy}" in {config.precision} has no use for. '
                'Leave it out, or give strategy="fsdp".'
            )
    if config.replicas > 1 and strategy != "fsdp":
        raise InvalidArgumentError(
            f'replicas is {config.replicas}, which is for strategy="fsdp", and it is "{strategy}".'
        )
    if strategy != "fsdp" and config.precision == "fp32":
        return _Plain

    # In bfloat16 the masters are FSDP2's, also where each process holds all of them.
    def sharded(origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None) -> Engine:
        replicas = config.replicas if strategy == "fsdp" else processes.size
        return _Sharded(origin, config, processes, progress, replicas=replicas)

    return sharded
