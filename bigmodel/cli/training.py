"""Training as it was asked for on a command line: what each way of it would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import bigmodel
from bigmodel.device_map.counter import NotTriedError
from bigmodel.errors import InvalidArgumentError, TrainingError

__all__ = ["plan_training"]

# Of each process, where nobody said how many.
_SAMPLES = 8


def plan_training(
    path: str,
    *,
    machine: str | None,
    limits: Mapping[int | str, int] | None,
    num_nodes: int,
    num_per_node: int | None,
    num_tokens: int,
    global_batch_size: int | None,
    micro_batch_size: int | None,
    strategy: str,
    precision: str,
    lora_rank: int | None,
    quantize_base: str | None,
    trust_remote_code: bool,
) -> Any:
    """The `Outlook` of fine-tuning a checkpoint with AdamW, of which headers alone are read.

    Args:
        limits: as max_memory: of all processes of a node together where it is "cpu" or "disk".

    Raises:
        InvalidArgumentError: an option means nothing here.
        TrainingError: the model cannot be tried without its weights.
    """
    from bigmodel.device_map.maps import resolve_limits
    from bigmodel.models import lora_of
    from bigmodel.training.choice import outlook_of
    from bigmodel.training.cluster import Cluster
    from bigmodel.training.config import TrainingConfig
    from bigmodel.training.weights import Origin

    there = bigmodel.Machine.probe() if machine is None else bigmodel.Machine.load(machine)
    if limits is not None:
        there = _within(there, resolve_limits(limits, there))
    if num_per_node is not None and there.accelerators and num_per_node > len(there.accelerators):
        first = there.accelerators[0]
        kind = first.device.partition(":")[0]
        there = replace(
            there,
            accelerators=tuple(replace(first, device=f"{kind}:{number}") for number in range(num_per_node)),
        )
    reserve = {} if limits is None else {"spare": 0.0}  # what is stated is used whole
    cluster = Cluster.of(there, num_nodes=num_nodes, num_per_node=num_per_node, **reserve)
    config = TrainingConfig(
        strategy=strategy,
        precision=precision,
        global_batch_size=global_batch_size or _SAMPLES * cluster.num_processes,
        micro_batch_size="auto" if micro_batch_size is None else micro_batch_size,
        quantize_base=quantize_base,
    )
    if strategy == "single" and cluster.num_processes > 1:
        raise InvalidArgumentError(
            f'--strategy is "single", and there are {cluster.num_processes} processes. Give --gpus 1, or another strategy.'
        )
    if quantize_base is not None and lora_rank is None:
        raise InvalidArgumentError(
            f'--quantize-base is "{quantize_base}", and what is in 4 bits is not trained. Give --lora RANK with it.'
        )
    adapter = None if lora_rank is None else lora_of(lora_rank)
    origin = Origin.of(path, adapter=adapter, quantize_base=quantize_base, trust_remote_code=trust_remote_code)
    try:
        return outlook_of(config, origin, cluster, num_tokens=num_tokens, deepspeed=True)
    except NotTriedError as error:
        raise TrainingError(f"What a step of {path} takes could not be tried: {error}") from error


def _within(machine: bigmodel.Machine, limits: Mapping[str, int]) -> bigmodel.Machine:
    """A machine that has what may be used of it."""
    used = [each for each in machine.accelerators if limits.get(each.device, 0) > 0]
    return replace(
        machine,
        accelerators=tuple(replace(each, memory_bytes=limits[each.device]) for each in used),
        host_bytes=limits["cpu"],
        disk_bytes=limits["disk"],
    )
