"""What ZeRO keeps on a disk, in files that DeepSpeed reads and writes: its buffers, its reader, and its files as maps."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.forecast import NUM_SWAP_BUFFERS, NUM_SWAPPED
from bigmodel.training.processes import Processes
from bigmodel.training.swap import mapped

__all__ = ["Flats", "held_of", "load_reader", "param_swapper", "size_buffers"]

logger = logging.getLogger("bigmodel.training")

_NEW = ".new"


def size_buffers(
    zero: dict[str, Any],
    *,
    numbers: Sequence[int],
    trained: Sequence[int],
    num_states: int,
    itemsize: int,
    num_processes: int,
) -> int:
    """Give DeepSpeed's settings buffers as large as what goes through them, where they say nothing: its own take gigabytes.

    Args:
        zero: the section ``zero_optimization``.
        numbers: values of each parameter.
        trained: of each that is trained.
        num_states: tensors that the optimizer keeps of a parameter.
        itemsize: bytes of a value that computes.
        num_processes: that it is divided over.

    Returns:
        Bytes of them, which are locked in memory.
    """
    size, locked = num_processes, 0
    group = min(int(zero.setdefault("sub_group_size", NUM_SWAPPED)) + max(trained) // size, sum(trained) // size)
    section = zero.get("offload_optimizer", {})
    if section.get("device") == "nvme":  # a master, a gradient, and states; of the groups before and after it too
        ahead = sum(bool(section.get(key)) for key in ("pipeline_read", "pipeline_write"))
        locked += 4 * group * int(section.setdefault("buffer_count", (2 + num_states) * (1 + ahead)))
    read = zero.get("offload_param", {})
    if read.get("device") == "nvme":
        largest = -(-max(numbers) // size)
        buffer = int(read.setdefault("buffer_size", max(largest, group if section.get("fast_init") else 0)))
        locked += itemsize * (buffer * int(read.setdefault("buffer_count", NUM_SWAP_BUFFERS)) + group)
        read.setdefault("max_in_cpu", 0)
        # What stays gathered keeps its buffer.
        zero.setdefault("stage3_max_reuse_distance", 0)
    return locked


class Flats:
    """An optimizer's flat tensors: in memory, or in files of a disk, whose values are maps of them.

    Args:
        tensors: that the optimizer steps.
        zero: DeepSpeed's optimizer around it, of stage 3; None where nothing is on a disk.
    """

    def __init__(self, tensors: list[torch.Tensor], zero: Any) -> None:
        self.tensors, self._zero = tensors, zero

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.tensors[number]

    def values(self, number: int, key: str | None = None) -> torch.Tensor:
        """A flat tensor's values; or, of one in a file, what the optimizer keeps of them."""
        if not self.is_away(number):
            return self.tensors[number].detach()
        return mapped(self._file(number, key), self.size(number), torch.float32)

    def size(self, number: int) -> int:
        """Values of a flat tensor."""
        if not self.is_away(number):
            return self.tensors[number].numel()
        return int(self._zero.fp16_partitioned_groups_flat_numel[number])

    def is_away(self, number: int) -> bool:
        """Whether it is in files."""
        return bool(self._zero is not None and self._zero._swappable_optimizer_subgroup(number))

    def name(self, number: int) -> str:
        """By which DeepSpeed's swapper knows it."""
        flat: Any = self.tensors[number]
        return str(flat.ds_id)

    def blank(self, number: int, key: str, dtype: torch.dtype) -> torch.Tensor:
        """Zeros where a state is to be read into; of one in a file, beside it until `put`."""
        flat = self.tensors[number].detach()
        if not self.is_away(number):
            return torch.zeros_like(flat, dtype=dtype)
        file = self._file(number, key) + _NEW
        with open(file, "wb") as opened:
            size = self._zero.optimizer_swapper._io_aligned_numel(self.size(number))
            os.posix_fallocate(opened.fileno(), 0, size * flat.itemsize)
        return mapped(file, self.size(number), dtype)

    def put(self, number: int, key: str) -> None:
        """What was read into `blank` takes the place of the file."""
        if self.is_away(number):
            os.replace(self._file(number, key) + _NEW, self._file(number, key))

    def _file(self, number: int, key: str | None) -> str:
        """Where DeepSpeed keeps it."""
        name = self.name(number)
        folder = self._zero.optimizer_swapper.swap_folder
        return os.path.join(folder, f"{name if key is None else f'{key}-{name}'}.tensor.swp")


def held_of(parameter: Any) -> torch.Tensor:
    """This process's range of a divided parameter ``[its share]``: in memory, or the file's values."""
    if parameter.ds_tensor.status.name == "AVAILABLE":
        held: torch.Tensor = parameter.ds_tensor.data
        return held
    swapper = parameter.nvme_swapper
    swapper.synchronize_writes()
    return mapped(swapper.get_path(parameter, True), parameter.ds_tensor.ds_numel, swapper.dtype)


def param_swapper(settings: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """DeepSpeed's reader of parameters from files, that takes what its caller gets wrong.

    What is read ahead may name a parameter twice, for forward and for the backward that follows it; and what was read ahead for a
    pass that did not come, such as backward after an evaluation, keeps its buffers.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    class Swapper(AsyncPartitionedParameterSwapper):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(DeepSpeedConfig(dict(settings)), dtype)
            self._read: dict[int, Any] = {}

        def swap_in(self, params: list[Any], async_op: bool = True, swap_in_buffers: Any = None) -> None:
            wanted = {each.ds_id: each for each in params}
            lacking = len(wanted) - self.available_swap_in_buffers()
            if swap_in_buffers is None and lacking > 0:
                raise TrainingError(
                    f"{len(wanted)} parameters of one module are read together from the disk, such as one of "
                    f"{tuple(next(iter(wanted.values())).ds_shape)}, and {self.available_swap_in_buffers()} buffers are free. "
                    'Give more: engine_options={"zero_optimization": {"offload_param": {"buffer_count": ...}}}.'
                )
            self._read |= wanted
            super().swap_in(list(wanted.values()), async_op=async_op, swap_in_buffers=swap_in_buffers)

        def forget(self) -> None:
            """Between passes: let go of what was read ahead and is not gathered."""
            self.synchronize_reads()
            self.remove_partition_and_release_buffers(
                [
                    each
                    for key, each in self._read.items()
                    if key in self.available_params and each.ds_status.name == "NOT_AVAILABLE"
                ]
            )

    return Swapper()


def load_reader(processes: Processes) -> None:
    """Compile DeepSpeed's reader and writer of files, where that was not done yet."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    error: Exception | None = None
    if not builder.is_compatible(verbose=False) or shutil.which("g++") is None:
        error = InvalidArgumentError(
            'offloading to "nvme" takes a part of DeepSpeed that is compiled here, and g++ or the headers of libaio are missing. '
            'Install them (apt-get install g++ libaio-dev), or offload to "cpu".'
        )
    processes.all_right(error)
    if processes.is_main:
        logger.info("DeepSpeed's reader of files is loaded: the first time it is compiled, which takes minutes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            builder.load(verbose=False)
    except Exception as caught:  # the others wait
        error = InvalidArgumentError(f"DeepSpeed's reader of files could not be compiled: {caught}")
    processes.all_right(error)
