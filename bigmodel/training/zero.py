"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) or parameters (3) divided over processes, as ranges of flat tensors.

With zero_disk.py all that knows DeepSpeed. Its optimizers keep float32 values flat: all of a group's parameters one after the
other, cut into equal ranges (1, 2), or an equal range of each parameter, one after the other (3).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bigmodel.errors import InvalidArgumentError, TrainingError, join_some
from bigmodel.models import owners_of
from bigmodel.progress import Report
from bigmodel.training.config import PRECISIONS, TrainingConfig
from bigmodel.training.gradients import LossScale, norm_and_sums, scale
from bigmodel.training.job import num_states
from bigmodel.training.pieces import Pieces
from bigmodel.training.processes import Processes
from bigmodel.training.strategy import Engine, Stored, refuse_narrow, refuse_scalars, told_of_offload
from bigmodel.training.swap import SwapFolder, mapped
from bigmodel.training.weights import Origin, put, with_masters
from bigmodel.training.zero_disk import Flats, held_of, load_reader, param_swapper, size_buffers

__all__ = ["ZeRO", "refuse_float16"]

logger = logging.getLogger("bigmodel.training")

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class _Place:
    """Where this process holds its range of a parameter.

    Attributes:
        shape: of the parameter.
        start: of the range, in the parameter's values.
        number: of values; 0 where it holds none.
        flat: number of the flat tensor.
        at: of the range, in the flat tensor.
    """

    shape: torch.Size
    start: int
    number: int
    flat: int
    at: int


class ZeRO(Engine):
    """A model in a DeepSpeedEngine; in bfloat16 the module has bfloat16 copies, and the masters are the optimizer's ranges."""

    def __init__(self, origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None) -> None:
        _import(processes)
        self.module, self.processes, self._origin, self._config = origin.module, processes, origin, config
        self._progress = progress
        self._stage = STAGES[config.strategy]
        self._dtype = PRECISIONS[config.precision]
        with_masters(origin.module)
        if self._dtype == torch.float32:
            refuse_narrow(origin.module)
        _refuse_frozen(origin.module, self._dtype)
        if self._stage < 3:
            refuse_scalars(origin.module, "DeepSpeed", 'strategy="zero3"')
        self.num_averaged, self.num_copies = processes.size, 1
        self.gathers, self.needs_gradients = self._stage == 3, True
        self._given: dict[str, torch.Tensor] = {}  # values of a module in memory
        self._places: dict[str, _Place] = {}
        self._flats = Flats([], None)
        self._groups: list[list[str]] = []
        self._blank: dict[tuple[int, str], torch.Tensor] = {}
        self._zero: Any = None
        self._num_passes = 0  # of a global batch, where their gradients are summed in host memory
        self._num_states = 0  # tensors that the optimizer keeps of a parameter

    def take(self, optimizer: Optimizer | None) -> None:
        import deepspeed

        if optimizer is None:
            raise InvalidArgumentError(
                f'strategy is "{self._config.strategy}", which divides an optimizer\'s state, and there is no optimizer. Give '
                "prepare one."
            )
        for number, group in enumerate(optimizer.param_groups):
            group["params"] = [each for each in group["params"] if each.requires_grad]
            if not group["params"]:
                raise InvalidArgumentError(
                    f"Parameter group {number} of the optimizer has no parameter that is trained, and DeepSpeed takes none "
                    "without. Leave it out."
                )
        names = {id(each): name for name, each in self.module.named_parameters()}
        self._groups = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]
        left = self.trained().keys() - {name for group in self._groups for name in group}
        if left:
            raise InvalidArgumentError(
                f"{len(left)} parameters that are trained are not in the optimizer, such as {min(left)}, and ZeRO has masters of "
                "those alone. Give the optimizer all of them, or call requires_grad_(False) on what is not trained."
            )
        if "nvme" in (self._config.offload_optimizer, self._config.offload_params):
            self.swap = self._swap_folder(optimizer)
        settings = self._settings()
        self._divide(settings) if self._stage == 3 else self._fill()
        now = dict(self.module.named_parameters())
        for group, known in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = [now[name] for name in known]
        with _quiet():
            engine, zero, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.model, self._zero = engine, zero
        if zero.optimizer is not optimizer:
            raise InvalidArgumentError(
                f"DeepSpeed replaces {type(optimizer).__name__} by one of its own. Give another optimizer."
            )
        if self._dtype == torch.float16:
            self.loss_scale = _DeepSpeedScale(self._zero.loss_scaler)
        self._find(optimizer)
        self._fill_masters()
        if self._config.offload_params == "nvme":
            self.module.register_forward_pre_hook(self._forget_read, prepend=True)

    @contextlib.contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        # Of several passes DeepSpeed would step with what the last one makes gradients of; `_finish_sums` knows all of them.
        is_summed = self._stage > 1 and self._config.offload_optimizer != "none"
        is_last = is_last and not (is_summed and self._num_passes)
        self._num_passes += is_summed
        self.model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def step(self, optimizer: Optimizer, most: float | None, sums: list[float]) -> tuple[float, list[float], bool]:
        if self.loss_scale is not None:
            self._zero.clip_grad = most or 0.0
            total = self.processes.summed(torch.tensor(sums, dtype=torch.float64)).tolist()
            self._finish_sums()
            self._begin_absent()
            self.model.step()  # type: ignore[operator]
            self._end_gradients()
            return float(self._zero._global_grad_norm), total, not self._zero.overflow
        self._finish_sums()
        # DeepSpeed's own factor is rounded to float32 three times, and a bfloat16 run shows each last bit.
        gradients, num_copies = self._gradients()
        norm, total = norm_and_sums(gradients, sums, self.processes, num_copies)
        if most is not None and math.isfinite(norm) and norm > most:
            scale(gradients, most / (norm + 1e-6))
        self._zero.clip_grad = 0.0
        self._begin_absent()
        self.model.step()  # type: ignore[operator]
        self._end_gradients()
        return norm, total, not self._zero.overflow

    def _finish_sums(self) -> None:
        """Sums of several passes in host memory go to where the step is computed."""
        if self._num_passes > 1:
            self.model.set_gradient_accumulation_boundary(True)  # type: ignore[operator]
            self._zero.finalize_gradient_accumulation_boundary()
        self._num_passes = 0

    def forget(self, optimizer: Optimizer) -> None:
        self._num_passes = 0
        self._zero.zero_grad()  # those of the optimizer's own parameters are DeepSpeed's, and stay where it is offloaded

    def _gradients(self) -> tuple[list[torch.Tensor], int]:
        """What this process holds of them, reduced, and how many processes hold the same."""
        if hasattr(self._zero, "get_grads_for_norm"):  # ZeRO-1 in bfloat16
            return list(self._zero.get_grads_for_norm(for_clipping=True)), self.processes.size
        if self._config.offload_optimizer == "none":
            return [each for group in self._zero.averaged_gradients.values() for each in group], 1
        if self.processes.device.type != "cpu":  # they are copied while backward goes on
            torch.accelerator.synchronize(self.processes.device)
        found = [flat.grad for flat in self._flats.tensors if flat.grad is not None]
        if self._config.offload_optimizer == "nvme":
            swapper = self._zero.optimizer_swapper
            swapper.flush_gradients()
            for info in swapper.swap_params_info.values():
                found += [mapped(each.path, each.length, torch.float32) for each in info.swapped_gradients.values()]
                found += info.unswapped_gradients.values()
        return found, 1

    def clip(self, optimizer: Optimizer, most: float) -> float | None:
        return None

    def _begin_absent(self) -> None:
        """Of what is on a disk, gradients of zeros for what had none: DeepSpeed steps with what its buffers hold."""
        for name, place in self._places.items() if self._config.offload_optimizer == "nvme" else ():
            info = self._zero.optimizer_swapper.swap_params_info.get(self._flats.name(place.flat))
            if info is not None and place.at not in info.swapped_gradients.keys() | info.unswapped_gradients.keys():
                parameter: Any = self.module.get_parameter(name)
                info.unswapped_gradients[place.at] = torch.zeros(parameter.partition_numel())

    @torch.no_grad()
    def _end_gradients(self) -> None:
        """Where a pass makes none, DeepSpeed adds to gradients of the step before, or steps with them again."""
        if self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        if self._config.offload_optimizer == "nvme":
            for info in self._zero.optimizer_swapper.swap_params_info.values():
                info.swapped_gradients = {}
                info.release_unswapped_gradients()
        if self._config.offload_optimizer != "none":
            sums = getattr(self._zero, "accumulated_grads_in_cpu", {}).values()
            for each in [*sums, *(flat.grad for flat in self._flats.tensors)]:
                if each is not None:
                    each.zero_()

    # --- Logical tensors

    def masters(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        parameter: Any
        for name, parameter in self.module.named_parameters():
            if name in self._places:
                found[name] = self._pieces(name, self._flats.values(self._places[name].flat))
            elif hasattr(parameter, "ds_tensor"):  # frozen, divided
                size = parameter.ds_tensor.ds_numel
                start = size * self.processes.rank
                number = max(0, min(size, parameter.ds_numel - start))
                found[name] = Pieces(parameter.ds_shape, start, held_of(parameter).detach()[:number])
            else:
                found[name] = parameter.detach()
        return found

    @torch.no_grad()
    def refreshed(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # a pass without gradients leaves some gathered
        self._forget_read()
        for number in range(len(self._flats)):
            flat, copies = self._flats.values(number), self._zero.fp16_partitioned_groups_flat[number]
            if copies is not None:
                copies.data.copy_(flat)
                continue
            at = 0
            for parameter in self._zero.fp16_groups[number]:
                size = parameter.ds_tensor.ds_numel
                held_of(parameter).copy_(flat[at : at + size])
                at += size
        kept = [each for each in self._zero.persistent_parameters if each.requires_grad]
        if kept:  # held whole by each process
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _forget_read(self, *of_forward: Any) -> None:
        parameter: Any = next(self.module.parameters())
        if self._config.offload_params == "nvme":
            parameter.nvme_swapper.forget()

    def groups(self, optimizer: Optimizer) -> list[list[str]]:
        return self._groups

    def states(self, optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, place in self._places.items():
            flat = self._flats[place.flat]
            for key, value in optimizer.state.get(flat, {}).items():
                tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
                size = self._flats.size(place.flat)
                is_away = self._flats.is_away(place.flat) and not tensor.numel()
                is_like = tensor.ndim and (is_away or tensor.numel() == size)
                # What is one for a flat tensor, such as a step, is saved once per parameter.
                found.setdefault(name, {})[key] = (
                    self._pieces(name, self._flats.values(place.flat, key) if is_away else tensor)
                    if is_like
                    else tensor.clone()
                )
        return found

    def blank_states(self, stored: Stored) -> dict[str, dict[str, torch.Tensor]]:
        flats: dict[tuple[int, str], torch.Tensor] = {}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, place in self._places.items():
            for key, each in stored.get(name, {}).items():
                if each.is_one:
                    found.setdefault(name, {})[key] = torch.zeros(each.shape, dtype=each.dtype)
                    continue
                if (place.flat, key) not in flats:
                    flats[place.flat, key] = self._flats.blank(place.flat, key, each.dtype)
                found.setdefault(name, {})[key] = self._pieces(name, flats[place.flat, key])
        self._blank = flats
        return found

    def refuse_states(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        ones: dict[tuple[int, str], dict[float, str]] = {}
        for name, values in states.items():
            for key, value in values.items():
                if not isinstance(value, Pieces):
                    ones.setdefault((self._places[name].flat, key), {}).setdefault(float(value), name)
        for (_, key), found in ones.items():
            if len(found) > 1:
                told = join_some([f"{name} ({number:g})" for number, name in found.items()])
                raise TrainingError(
                    f"Parameters have different values of {key!r} in the optimizer's state: {told}. ZeRO keeps one for all "
                    'parameters of a group. Go on with strategy="fsdp", or give them groups of their own.'
                )

    def put_states(self, optimizer: Optimizer, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        optimizer.state.clear()
        if self._config.offload_optimizer == "nvme":
            self._zero.optimizer_swapper.purge_state()
        for (number, key), flat in self._blank.items():
            self._flats.put(number, key)
            optimizer.state[self._flats[number]][key] = flat
        for name, values in states.items():
            for key, value in values.items():
                if not isinstance(value, Pieces):
                    optimizer.state[self._flats[self._places[name].flat]][key] = value.clone()
        self._blank = {}

    def arguments(self) -> dict[str, Any]:
        return self._settings()

    def describe(self) -> str:
        told = told_of_offload(self._config, self.processes)
        if self.swap is not None:
            told += f" (this process reads {self.swap.read_bytes_per_s / 1e9:.2g} GB/s there, and writes "
            told += f"{self.swap.write_bytes_per_s / 1e9:.2g} GB/s)"
        return f"DeepSpeed ZeRO-{self._stage}, {self._config.precision}, {self.processes.size} parts{told}"

    # --- How

    def _settings(self) -> dict[str, Any]:
        config = self._config
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # ours are weighed and counted already
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.grad_clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self._dtype == torch.bfloat16, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": config.reduce_dtype or "fp32",
        }
        if self._dtype == torch.float16:
            settings["fp16"] = {
                "enabled": True,
                "loss_scale": 0 if config.loss_scale == "dynamic" else config.loss_scale,
                "initial_scale_power": round(math.log2(LossScale.FIRST)),
                "loss_scale_window": LossScale.INTERVAL,
                "hysteresis": 1,  # halved after each overflow
            }
        options = dict(config.engine_options)
        zero = {"stage": self._stage, **options.pop("zero_optimization", {})}
        for key, to in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_params)):
            if to != "none":
                is_pinned = self.processes.device.type != "cpu"
                zero[key] = {"pin_memory": is_pinned, **zero.get(key, {}), "device": to}
        if "nvme" in (config.offload_optimizer, config.offload_params):
            self._size_buffers(zero)
            for key in ("offload_optimizer", "offload_param"):
                if zero.get(key, {}).get("device") == "nvme" and self.swap is not None:
                    zero[key]["nvme_path"] = str(self.swap.path)
        return {**settings, **options, "zero_optimization": zero}

    def _size_buffers(self, zero: dict[str, Any]) -> int:
        return size_buffers(
            zero,
            numbers=[_num_values(each) for each in self.module.parameters()],
            trained=[_num_values(each) for each in self.trained().values()],
            num_states=self._num_states,
            itemsize=self._dtype.itemsize,
            num_processes=self.processes.size,
        )

    def _swap_folder(self, optimizer: Optimizer) -> SwapFolder:
        load_reader(self.processes)
        self._num_states = num_states(optimizer)
        on_disk = 0
        if self._config.offload_optimizer == "nvme":
            on_disk += 4 * (2 + self._num_states) * sum(each.numel() for each in self.trained().values())
        if self._config.offload_params == "nvme":
            on_disk += self._dtype.itemsize * sum(each.numel() for each in self.module.parameters())
        assert self._config.nvme_folder is not None
        return SwapFolder.make(
            self._config.nvme_folder,
            self.processes,
            disk_bytes=-(-on_disk // self.processes.size),
            locked_bytes=self._size_buffers(self._settings()["zero_optimization"]),
        )

    def _fill(self) -> None:
        """The model whole in this process, in the dtype that computes."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and parameter.dtype != self._dtype:
                if not parameter.is_meta:
                    self._given[name] = parameter.data
                parameter.data = parameter.data.to(self._dtype)
        self._origin.fill(self.processes.device, self._progress)

    def _divide(self, settings: dict[str, Any]) -> None:
        """This process's range of each parameter, in the dtype that computes; no more is read."""
        from deepspeed import zero

        class Divided(zero.Init):  # type: ignore[misc]
            """Cuts parameters without sending them: each process reads its own range."""

            def _zero_init_param(self, parameter: Any) -> None:
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()

        settings = {**settings, "train_batch_size": self.processes.size}
        swapper = param_swapper(settings, self._dtype) if self._config.offload_params == "nvme" else None
        divided = Divided(module=nn.Module(), config_dict_or_path=settings, param_swapper=swapper)
        owners = owners_of(self.module)
        wanted = {}
        for name, parameter in list(self.module.named_parameters()):
            dtype = self._dtype if parameter.requires_grad else parameter.dtype
            if parameter.is_meta:
                size = -(-parameter.numel() // self.processes.size)
                start = min(size * self.processes.rank, parameter.numel())
                wanted[name] = start, min(start + size, parameter.numel()), dtype
                put(parameter, torch.empty(parameter.numel(), dtype=dtype), owners)
            elif parameter.dtype != dtype:
                self._given[name] = parameter.data
                parameter.data = parameter.data.to(dtype)
            divided._convert_to_zero_parameters([self.module.get_parameter(name)])
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        for tensors in self._origin.values(wanted, self._progress):
            for name, values in tensors.items():
                held_of(parameters[name])[: values.numel()].copy_(values)
        self._origin.fill_buffers(self.processes.device)

    def _find(self, optimizer: Optimizer) -> None:
        """Where ranges lie in the flat tensors."""
        zero = self._zero
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        if self._stage == 3:
            self._flats = Flats(list(zero.fp32_partitioned_groups_flat), zero)
            for name in (name for group in self._groups for name in group):
                each = parameters[name]
                flat, at, size = zero.grad_position[zero.get_param_id(each)]
                start = size * self.processes.rank
                number = max(0, min(size, each.ds_numel - start))
                self._places[name] = _Place(each.ds_shape, start, number, flat, at)
            return
        self._flats = Flats([group["params"][0] for group in optimizer.param_groups], None)
        for flat, names in enumerate(self._groups):
            for name in names:
                held = parameters[name]._hp_mapping
                start, at, number = 0, 0, 0
                if held is not None:
                    start, number = held.lp_fragment_address.start, held.lp_fragment_address.numel
                    at = held.hp_fragment_address.start
                self._places[name] = _Place(parameters[name].shape, start, number, flat, at)

    @torch.no_grad()
    def _fill_masters(self) -> None:
        """Masters are made of the copies that compute: what these rounded away is read, or taken from what was given."""
        if self._dtype == torch.float32:
            return
        narrow = {}
        for name, place in self._places.items():
            if name in self._given:
                values = self._given[name].reshape(-1)[place.start : place.start + place.number]
                self._range(name, self._flats.values(place.flat)).copy_(values)
            elif name in self._origin.sources and self._origin.sources[name].stored_dtype != self._dtype:
                narrow[name] = place.start, place.start + place.number, torch.float32
        self._given = {}
        for tensors in self._origin.values(narrow):
            for name, values in tensors.items():
                self._range(name, self._flats.values(self._places[name].flat)).copy_(values)

    def _range(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        place = self._places[name]
        return flat.detach()[place.at : place.at + place.number]

    def _pieces(self, name: str, flat: torch.Tensor) -> Pieces:
        return Pieces(self._places[name].shape, self._places[name].start, self._range(name, flat))


def _num_values(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class _DeepSpeedScale(LossScale):
    """DeepSpeed's own, which its backward and step use."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    @property
    def value(self) -> float:  # type: ignore[override]
        return float(self._scaler.cur_scale)

    def state_dict(self) -> dict[str, float]:
        scaler = self._scaler
        num_good = (scaler.cur_iter - scaler.last_overflow_iter - 1) % self.INTERVAL if scaler.dynamic else 0
        return {"value": self.value, "num_good": num_good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        scaler = self._scaler
        if scaler.dynamic:
            scaler.cur_scale = state["value"]
            scaler.last_overflow_iter = scaler.cur_iter - 1 - int(state["num_good"])


def refuse_float16(processes: Processes) -> None:
    """InvalidArgumentError where DeepSpeed does not compute in float16."""
    _import(processes)
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if not accelerator.is_fp16_supported():
        raise InvalidArgumentError(
            f'precision is "fp16", which DeepSpeed refuses on this {accelerator.device_name()}. Give strategy="fsdp", or '
            'precision="bf16".'
        )


def _import(processes: Processes) -> None:
    """Makes DeepSpeed use the processes that there are."""
    if processes.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(processes.local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise InvalidArgumentError(
            'strategy="zero1", "zero2" and "zero3" are DeepSpeed\'s, which is not installed. Run pip install '
            '"bigmodel[training]", or give "ddp" or "fsdp".'
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes.mesh(1)  # a group, where this process is alone
    if processes.device.type == "cpu":
        # Compiled at the first use otherwise, half a minute, and used for inference alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls what torch calls deprecated, in each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed's imports warn its own authors of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """InvalidArgumentError for frozen parameters that DeepSpeed would change: it has one dtype for all."""
    others = [
        f"{name} ({each.dtype})"
        for name, each in module.named_parameters()
        if not each.requires_grad and each.is_floating_point() and each.dtype != dtype
    ]
    if others:
        raise InvalidArgumentError(
            f"{len(others)} frozen parameters are not {dtype}, such as {others[0]}: DeepSpeed computes with one dtype, and would "
            f'round them for good. Call .to({dtype}) on them, or give strategy="fsdp".'
        )
