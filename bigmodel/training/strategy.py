"""What carries gradients between processes: the model whole in each, or its parts divided over them. The libraries' own."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bigmodel.errors import InvalidArgumentError
from bigmodel.models import is_adapted, trains_adapters_alone
from bigmodel.progress import Report
from bigmodel.training.config import DTYPES, PRECISIONS, TrainingConfig
from bigmodel.training.float8 import use_float8
from bigmodel.training.gradients import LossScale, gradients_of, norm_and_sums, scale
from bigmodel.training.pieces import Pieces
from bigmodel.training.processes import Processes
from bigmodel.training.quantized import Quantized
from bigmodel.training.swap import SwapFolder
from bigmodel.training.weights import Origin, with_masters

__all__ = [
    "Engine",
    "Plain",
    "Sharded",
    "Stored",
    "StoredState",
    "Streamed",
    "refuse_narrow",
    "refuse_scalars",
    "told_of_offload",
]


@dataclass(frozen=True)
class StoredState:
    """What a checkpoint holds of an optimizer's state for a parameter, under one key.

    Attributes:
        shape, dtype: of the tensor.
        is_one: whether it is one for the parameter, such as a step, and not one for each of its values.
    """

    shape: torch.Size
    dtype: torch.dtype
    is_one: bool


Stored = Mapping[str, Mapping[str, StoredState]]
"""Name of a parameter -> key of the optimizer's state -> what there is."""


class Engine(ABC):
    """A model in the hands of a library.

    Attributes:
        model: what is called.
        module: the user's, with the user's names.
        processes: that train together.
        num_averaged: processes over whose gradients the library takes the mean.
        num_copies: processes that hold each part.
        loss_scale: of float16; None for other precisions.
        gathers: whether passes gather weights from other processes, so that all make as many.
        needs_gradients: whether the library cannot step without a backward since the last step.
        swap: where something is offloaded to a disk.
    """

    model: nn.Module
    module: nn.Module
    processes: Processes
    num_averaged: int
    num_copies: int
    loss_scale: LossScale | None = None
    gathers: bool = False
    needs_gradients: bool = False
    swap: SwapFolder | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """Name -> what an optimizer is made of."""
        return {name: each for name, each in self.module.named_parameters() if each.requires_grad}

    def take(self, optimizer: Optimizer | None) -> None:  # noqa: B027  # most have nothing to do
        """The optimizer, before the first pass; None where nothing is trained."""

    @abstractmethod
    def syncing(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are reduced in the last one alone."""

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Gradients of a loss, added to those that there are; `is_last` of the global batch."""
        times = 1.0 if self.loss_scale is None else self.loss_scale.value
        (loss if times == 1.0 else loss * times).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: Optimizer, most: float | None, sums: list[float]) -> tuple[float, list[float], bool]:
        """Clip and step, unless a gradient is not finite, and clear the gradients.

        Args:
            most: the largest norm of all gradients; None for no limit.
            sums: this process's part of what is added up over all of them on the way.

        Returns:
            The norm before clipping, the sums, and whether it stepped: the same in all processes.
        """
        gradients = gradients_of(parameter for group in optimizer.param_groups for parameter in group["params"])
        norm, sums = norm_and_sums(gradients, sums, self.processes, self.num_copies)
        factor = 1.0 if self.loss_scale is None else 1.0 / self.loss_scale.value
        norm *= factor
        is_finite = math.isfinite(norm)
        if is_finite:
            if most is not None and norm > most:
                factor *= most / (norm + 1e-6)
            scale(gradients, factor)
            optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(is_finite)
        self.forget(optimizer)
        return norm, sums, is_finite

    def forget(self, optimizer: Optimizer) -> None:
        """Let go of the gradients that there are."""
        optimizer.zero_grad()

    def clip(self, optimizer: Optimizer, most: float) -> float | None:
        """Clip gradients now; their norm before, or None where the library clips in its step."""
        gradients = gradients_of(parameter for group in optimizer.param_groups for parameter in group["params"])
        norm, _ = norm_and_sums(gradients, [], self.processes, self.num_copies)
        loss_scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        norm /= loss_scale
        if math.isfinite(norm) and norm > most:
            scale(gradients, most / (norm + 1e-6))
        return norm

    def rest(self) -> None:  # noqa: B027  # most have nothing to do
        """Between passes: the module's parameters are the masters, and not copies to compute with."""

    def saved(self) -> dict[str, torch.Tensor]:
        """Of `masters`, what a checkpoint holds: all, or the adapters without the model that they are around."""
        held = self.masters()
        return {name: held[name] for name in self.trained()} if is_adapted(self.module) else held

    # --- Logical tensors: a DTensor, Pieces, or the whole, in this process's memory

    def masters(self) -> dict[str, torch.Tensor]:
        """Name -> a parameter's values: what is trained in float32."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def refreshed(self) -> None:  # noqa: B027  # most have nothing to do
        """After values were read into the masters: what is computed with follows them."""

    def whole(self, name: str) -> torch.Tensor:
        """All of a parameter's master, in every process; all of them call it."""
        return _whole(self.masters()[name], self.processes)

    def groups(self, optimizer: Optimizer) -> list[list[str]]:
        """Names of the parameters in each of the optimizer's groups that are trained."""
        names = {id(parameter): name for name, parameter in self.trained().items()}
        return [
            [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
            for group in optimizer.param_groups
        ]

    def states(self, optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
        """Name -> key -> what the optimizer keeps of a parameter."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return {
            names[id(parameter)]: {
                key: value if isinstance(value, torch.Tensor) else torch.tensor(value) for key, value in values.items()
            }
            for parameter, values in optimizer.state.items()
        }

    def blank_states(self, stored: Stored) -> dict[str, dict[str, torch.Tensor]]:
        """Of parameters that are trained, as `states`: where values of these shapes and dtypes are to be read into."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self.trained().items():
            for key, each in stored.get(name, {}).items():
                blank = torch.zeros(each.shape, dtype=each.dtype)  # every process has it
                value = blank if each.is_one else torch.zeros_like(parameter.detach(), dtype=each.dtype)
                found.setdefault(name, {})[key] = value
        return found

    def refuse_states(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:  # noqa: B027  # most take any
        """TrainingError for what `put_states` cannot put; called when only what is one for a parameter was read."""

    def put_states(self, optimizer: Optimizer, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """What was read into `blank_states`, in place of what the optimizer kept."""
        parameters = dict(self.module.named_parameters())
        optimizer.state.clear()
        for name, values in states.items():
            optimizer.state[parameters[name]] = dict(values)
        for group in optimizer.param_groups:
            if group.get("fused") or group.get("capturable"):  # their kernels count on the device
                for parameter in group["params"]:
                    values = optimizer.state.get(parameter, {})
                    if "step" in values:
                        values["step"] = values["step"].to(parameter.device)

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What the library was given: a DeepSpeed JSON, or what FSDP2 and DDP are called with."""

    @abstractmethod
    def describe(self) -> str:
        """One line."""


class Plain(Engine):
    """The model whole, in float32; with several processes DDP reduces its gradients."""

    def __init__(self, origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None) -> None:
        self.processes = processes
        with_masters(origin.module)
        refuse_narrow(origin.module)
        origin.fill(processes.device, progress)
        self.module = self.model = origin.module.to(processes.device)
        self.num_averaged = self.num_copies = processes.size
        self._arguments: dict[str, Any] = {}
        if processes.size > 1:
            devices = [processes.device] if processes.device.type != "cpu" else None
            self._arguments = {"device_ids": devices, "find_unused_parameters": config.find_unused_parameters}
            self.model = DistributedDataParallel(self.module, **self._arguments)

    @contextlib.contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        ddp = self.model
        with ddp.no_sync() if isinstance(ddp, DistributedDataParallel) and not is_last else contextlib.nullcontext():
            yield

    def arguments(self) -> dict[str, Any]:
        return self._arguments

    def describe(self) -> str:
        return "DistributedDataParallel, float32" if self.num_copies > 1 else "one process, float32"


class Streamed(Engine):
    """Adapters in memory, on a model whose weights stay where its plan has them, and are fetched for passes and backward."""

    def __init__(self, origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None) -> None:
        if processes.size > 1:
            raise InvalidArgumentError(
                f"The model streams its weights, or spans devices, and {processes.size} processes were started. Start one, or "
                'give the folder of its checkpoint, of which each process reads its part (strategy="fsdp").'
            )
        if config.strategy not in ("auto", "single"):
            raise InvalidArgumentError(
                f'strategy is "{config.strategy}", and the model streams its weights, or spans devices. Give strategy="single", '
                "or the folder of its checkpoint."
            )
        if config.precision != "fp32":
            raise InvalidArgumentError(
                f'precision is "{config.precision}", and on weights that stream adapters compute in float32, the weights in the '
                'dtype that they have. Give precision="fp32".'
            )
        self.processes, self.module, self.model = processes, origin.module, origin.module
        self.num_averaged = self.num_copies = 1
        with_masters(origin.module)

    @contextlib.contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        yield

    def arguments(self) -> dict[str, Any]:
        return {}

    def describe(self) -> str:
        return "one process, adapters in float32 on weights that stay where the plan has them"


class Sharded(Engine):
    """FSDP2: each unit's parameters are divided over the processes of a mesh, or held whole by each for their masters' sake."""

    def __init__(
        self, origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None, *, replicas: int
    ) -> None:
        self.processes, self.module, self.model = processes, origin.module, origin.module
        with_masters(origin.module)
        mesh = processes.mesh(replicas)
        dtype = PRECISIONS[config.precision]
        if dtype == torch.float32:
            refuse_narrow(origin.module)
        if dtype == torch.float16:
            self.loss_scale = LossScale(config.loss_scale)
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=DTYPES[config.reduce_dtype or "fp32"],
        )
        options: dict[str, Any] = {
            "mesh": mesh if replicas > 1 or processes.size == 1 else mesh["shard"],
            "mp_policy": policy,
            "reshard_after_forward": config.reshard_after_forward and processes.size > replicas,
            "offload_policy": OffloadPolicy(),
        }
        home = processes.device
        if config.offload_params == "cpu":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=home.type != "cpu")
            home = torch.device("cpu")
        if processes.size > 1:
            refuse_scalars(origin.module, "FSDP2", 'strategy="ddp" with precision="fp32", or "zero3"')
        # What is frozen and held whole computes as it is: a second copy would be one of the whole base under adapters.
        is_whole = processes.size == replicas
        options["ignored_params"] = {
            each
            for each in origin.module.parameters()
            if not each.ndim or (is_whole and not each.requires_grad and each.dtype == dtype)
        }
        options["ignored_params"] |= {
            each.weight for each in origin.module.modules() if isinstance(each, Quantized)
        }  # held whole
        names = {module: name for name, module in origin.module.named_modules()}
        units = [names[module] for module in origin.groups(config.engine_options.get("units"))]
        in_float8: list[str] = []
        if config.precision == "fp8":  # which replaces modules
            in_float8 = use_float8(origin.module, emulates=bool(config.engine_options.get("emulate_float8")))
        groups: list[Any] = [origin.module.get_submodule(name) for name in units]
        # Backward begins with what comes after the last block, such as the head: freed, it would be gathered again at once.
        blocks = [number for number, module in enumerate(groups) if any(True for _ in module.children())]
        num_freed = max(blocks, default=len(groups) - 1) + 1
        for number, module in enumerate([*groups, origin.module]):
            kept = options if number < num_freed else {**options, "reshard_after_forward": False}
            fully_shard(module, **kept)
        if is_adapted(origin.module):  # whose generate calls what is inside it
            register_fsdp_forward_method(origin.module, "generate")
        self._prefetch = config.engine_options.get("prefetch")
        if self._prefetch is not None:
            for number, module in enumerate(groups):
                module.set_modules_to_forward_prefetch(groups[number + 1 : number + 1 + self._prefetch])
                module.set_modules_to_backward_prefetch(groups[max(0, number - self._prefetch) : number][::-1])
        self._arguments = {
            "groups": [*units, ""],
            "mesh": list(options["mesh"].shape),
            "param_dtype": str(policy.param_dtype),
            "reduce_dtype": str(policy.reduce_dtype),
            "reshard_after_forward": options["reshard_after_forward"],
            "stay_gathered": [*units[num_freed:], ""] if options["reshard_after_forward"] else [*units, ""],
            "prefetch": "one unit, as FSDP2 does by itself" if self._prefetch is None else self._prefetch,
        }
        if in_float8:
            self._arguments["float8"] = in_float8
        if config.offload_params == "cpu":
            self._arguments["offload_policy"] = str(options["offload_policy"])
        origin.fill(processes.device, progress, home=home)
        self.num_averaged, self.num_copies = processes.size, replicas
        self.gathers = processes.size > replicas
        self._offloaded = told_of_offload(config, processes)
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

    def arguments(self) -> dict[str, Any]:
        return self._arguments

    def describe(self) -> str:
        parts = f"{self._num_groups} groups, {self._num_parts} parts, {self.num_copies} copies of each"
        return f"FSDP2, {self._precision}, {parts}{self._offloaded}"


def told_of_offload(config: TrainingConfig, processes: Processes) -> str:
    """What is offloaded, for `Engine.describe`."""
    asked = (("parameters", config.offload_params), ("optimizer state", config.offload_optimizer))
    told = ""
    for place, name in (("cpu", "in host memory"), ("nvme", f"in {config.nvme_folder}")):
        parts = [what for what, to in asked if to == place]
        if parts:
            told += f", {' and '.join(parts)} {name}"
        if parts and place == processes.device.type:
            told += " (which computes here: nothing is won)"
    return told


def refuse_narrow(module: nn.Module) -> None:
    """InvalidArgumentError for frozen parameters that float32 does not compute with; LoRA's layers do, with any."""
    if trains_adapters_alone(module):
        return
    narrow = [name for name, each in module.named_parameters() if each.is_floating_point() and each.itemsize < 4]
    if narrow:
        raise InvalidArgumentError(
            f'precision is "fp32", and {len(narrow)} frozen parameters are narrower, such as {narrow[0]}. Give '
            'precision="bf16", or call .float() on them.'
        )


def refuse_scalars(module: nn.Module, library: str, others: str) -> None:
    """InvalidArgumentError for parameters without a dimension, which a library does not divide; `others` do."""
    names = [name for name, each in module.named_parameters() if not each.ndim]
    if names:
        raise InvalidArgumentError(
            f"{len(names)} parameters are scalars, such as {names[0]}, which {library} does not divide. Give {others}."
        )


def _whole(value: Any, processes: Processes) -> torch.Tensor:
    if isinstance(value, Pieces):
        return value.whole(processes)
    whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole
