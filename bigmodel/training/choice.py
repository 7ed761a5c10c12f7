"""Which engine carries out a configuration here, and what is refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable

from bigmodel.errors import InvalidArgumentError
from bigmodel.progress import Report
from bigmodel.training.config import TrainingConfig
from bigmodel.training.float8 import refuse_float8
from bigmodel.training.processes import Processes
from bigmodel.training.strategy import Engine, Plain, Sharded
from bigmodel.training.weights import Origin
from bigmodel.training.zero import ZeRO, refuse_float16

__all__ = ["engine_of"]

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
    is_zero = strategy.startswith("zero")
    of_use = {
        "reduce_dtype": strategy == "fsdp" or is_zero or config.precision != "fp32",
        "reshard_after_forward": strategy == "fsdp",
        "find_unused_parameters": strategy == "ddp" and config.precision == "fp32",
    }
    for name, default in (("reduce_dtype", None), ("reshard_after_forward", True), ("find_unused_parameters", False)):
        if getattr(config, name) != default and not of_use[name]:
            raise InvalidArgumentError(
                f'{name} is {getattr(config, name)!r}, which strategy="{strategy}" in {config.precision} has no use for. '
                "Leave it out."
            )
    if config.replicas > 1 and strategy != "fsdp":
        raise InvalidArgumentError(
            f'replicas is {config.replicas}, which is for strategy="fsdp", and it is "{strategy}".'
        )
    if config.precision == "fp8":
        if strategy != "fsdp":
            raise InvalidArgumentError(
                f'precision is "fp8", which is for strategy="fsdp", and it is "{strategy}". Give that, or precision="bf16".'
            )
        refuse_float8(processes.device, emulates=bool(config.engine_options.get("emulate_float8")))
    if is_zero:
        if config.precision == "fp16":
            refuse_float16(processes)
        return ZeRO
    if strategy != "fsdp" and config.precision == "fp32":
        return Plain

    # In bfloat16 the masters are FSDP2's, also where each process holds all of them.
    def sharded(origin: Origin, config: TrainingConfig, processes: Processes, progress: Report | None) -> Engine:
        replicas = config.replicas if strategy == "fsdp" else processes.size
        return Sharded(origin, config, processes, progress, replicas=replicas)

    return sharded
