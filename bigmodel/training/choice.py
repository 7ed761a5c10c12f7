"""Which engine carries out a configuration here: chosen before anything is read, and what is refused."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.machine import Machine
from bigmodel.draws import draws_kept
from bigmodel.errors import InvalidArgumentError, MissingFilesError
from bigmodel.progress import Report
from bigmodel.training.cluster import Cluster
from bigmodel.training.config import PRECISIONS, TrainingConfig
from bigmodel.training.float8 import refuse_float8
from bigmodel.training.folders import complete_ones, read_manifest
from bigmodel.training.forecast import Forecast
from bigmodel.training.job import job_of
from bigmodel.training.outlook import Outlook, has_deepspeed, look_out
from bigmodel.training.processes import Processes
from bigmodel.training.quantized import refuse_quantized
from bigmodel.training.sources import Listed, Source
from bigmodel.training.strategy import Engine, Plain, Sharded
from bigmodel.training.swap import SwapFolder
from bigmodel.training.weights import Origin
from bigmodel.training.zero import ZeRO, refuse_float16

__all__ = ["CHOSEN", "cluster_here", "decide", "engine_of", "outlook_of", "stays_open"]

logger = logging.getLogger("bigmodel.training")

CHOSEN = (
    "strategy",
    "reshard_after_forward",
    "replicas",
    "offload_optimizer",
    "offload_params",
    "activation_checkpointing",
    "micro_batch_size",
)
"""What a forecast chooses of a configuration."""
# For several processes, where it could not be forecast: whether parameters are divided.
_UNTRIED = {True: "fsdp", False: "ddp"}
_OF_ENGINES = ("reshard_after_forward", "replicas", "offload_optimizer", "offload_params")

# Samples that are looked at for the longest; what is sent to learn how fast processes talk, and how often.
_NUM_SAMPLES, _SENT_BYTES, _NUM_SENT = 64, 8 << 20, 5

Make = Callable[[Origin, TrainingConfig, Processes, "Report | None"], Engine]


def engine_of(config: TrainingConfig, processes: Processes) -> Make:
    """What carries out a configuration here.

    Raises:
        InvalidArgumentError: it cannot be had here: why, and what can.
    """
    strategy = config.strategy
    if strategy == "auto":
        strategy = "single" if processes.size == 1 else _UNTRIED[config.quantize_base is None]
    if config.quantize_base is not None:
        refuse_quantized(config.quantize_base, processes.device)
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


def stays_open(config: TrainingConfig, processes: Processes, of_loader: int | None) -> bool:
    """Whether a forecast decides something of a configuration here.

    Args:
        of_loader: samples of a pass, where a DataLoader of the user's says.
    """
    if config.strategy == "auto" and (
        processes.size > 1 or processes.device.type != "cpu" or config.nvme_folder is not None
    ):
        return True
    return config.micro_batch_size == "auto" and of_loader is None and config.global_batch_size is not None


def decide(
    config: TrainingConfig,
    origin: Origin,
    processes: Processes,
    *,
    source: Source | None,
    optimizer: Any,
    resumes: str | os.PathLike[str] | None = None,
) -> tuple[TrainingConfig, Outlook | None]:
    """A configuration with nothing left open, the same in all processes; all of them call it.

    Args:
        config: what it states is kept.
        origin: nothing of it was read.
        source: of samples, whose longest is looked for; None where the loop has its own.
        optimizer: as `prepare` was given it.
        resumes: a checkpoint, or a folder of them, whose choices are kept where they are open and as many processes train.

    Returns:
        The configuration, and on the main process the outlook that it was chosen from; None where it could not be made, or where
        the choice of another run was kept.

    Raises:
        DoesNotFitError: nothing that it leaves open fits.
    """
    link = _link_bytes_per_s(processes)
    here: Cluster | None = None
    error: BaseException | None = None
    try:
        here = cluster_here(Machine.probe(config.nvme_folder), processes, link, nvme_folder=config.nvme_folder)
    except Exception as caught:  # the others wait
        error = caught
    processes.all_right(error)
    own: list[Cluster] = processes.gathered(here)
    fields: dict[str, Any] = {}
    outlook: Outlook | None = None
    if processes.is_main:
        try:
            fields = _kept(config, resumes, processes)
            if not fields:
                cluster = min(own, key=lambda each: each.limit_bytes)  # the smallest limits all
                cluster = replace(cluster, disk_limit_bytes=min(each.disk_limit_bytes for each in own))
                of_loader = None if source is None else source.batch_size
                known = of_loader or (
                    None if source is None or isinstance(source, Listed) else 1
                )  # of lengths nobody knows
                open_config = config
                if known is not None and config.micro_batch_size == "auto":
                    open_config = replace(config, micro_batch_size=known)
                outlook = outlook_of(
                    open_config,
                    origin,
                    cluster,
                    source=source,
                    optimizer=optimizer,
                    deepspeed=_takes_zero(origin, optimizer, config),
                )
                fields = _fields(outlook.take(), config, of_loader)
                logger.info("%s", outlook.explain())
        except NotTriedError as caught:
            logger.warning(
                "What a step takes could not be tried, and nothing is chosen by it: the strategy is %s, a pass has the samples "
                "that are stated, or one. Why: %s",
                config.strategy
                if config.strategy != "auto"
                else ("single" if processes.size == 1 else _UNTRIED[config.quantize_base is None]),
                caught,
            )
        except Exception as caught:  # the others wait
            error = caught
    processes.all_right(error)
    fields = processes.same(fields)
    if "nvme" not in [fields.get(name, getattr(config, name)) for name in ("offload_optimizer", "offload_params")]:
        fields = {**fields, "nvme_folder": None}
    return replace(config, **fields), outlook


def outlook_of(
    config: TrainingConfig,
    origin: Origin,
    cluster: Cluster,
    *,
    source: Source | None = None,
    optimizer: Any = None,
    num_tokens: int = 0,
    deepspeed: bool | None = None,
) -> Outlook:
    """What each way that a configuration leaves open would take.

    Args:
        source: of samples; where there are none, or none can be asked for, of `num_tokens` each.
        deepspeed: as `look_out`.

    Raises:
        NotTriedError: the model, its optimizer or fake tensors cannot follow.
    """
    example = _longest(source)
    micro = config.micro_batch_size if isinstance(config.micro_batch_size, int) else 1
    tokens = num_tokens or min(
        1024, int(getattr(getattr(origin.module, "config", None), "max_position_embeddings", 1024))
    )
    made = {
        "precision": config.precision,
        "global_batch_size": config.global_batch_size or micro * cluster.num_processes,
        "optimizer": optimizer,
        "units": config.engine_options.get("units"),
    }
    stated = (
        config if config.micro_batch_size != "auto" or config.global_batch_size else replace(config, micro_batch_size=1)
    )
    if example is not None:
        job = job_of(origin, example=example, **made)
        try:
            return look_out(job, cluster, stated, deepspeed=deepspeed)
        except NotTriedError as first:  # what is in a batch may be what a forward decides by
            try:
                return look_out(
                    job_of(origin, num_tokens=job.tokens_per_sample, **made), cluster, stated, deepspeed=deepspeed
                )
            except NotTriedError:
                raise first from None
    return look_out(job_of(origin, num_tokens=tokens, **made), cluster, stated, deepspeed=deepspeed)


def cluster_here(
    machine: Machine,
    processes: Processes,
    link_bytes_per_s: float | None = None,
    *,
    nvme_folder: str | os.PathLike[str] | None = None,
    swap: SwapFolder | None = None,
) -> Cluster:
    """What these processes have, on nodes like this machine.

    Args:
        machine: its disk is the one that would be written to.
        link_bytes_per_s: as it was measured; a default if None.
        nvme_folder: None where nothing may be written.
        swap: where something lies on that disk already; the machine's rates, of another folder, hold if None.
    """
    # Where no launcher says, all are taken to be on one host: less is promised to each.
    local = min(processes.size, int(os.environ.get("LOCAL_WORLD_SIZE", processes.size)))
    if processes.device.type == "cpu":
        machine = replace(machine, accelerators=())
    elif processes.size == 1:  # the one that it computes on
        own = [each for each in machine.accelerators if each.device == str(processes.device)]
        machine = replace(machine, accelerators=tuple(own or machine.accelerators[:1]))
    elif 0 < len(machine.accelerators) < local:  # each process sees its own alone
        first = machine.accelerators[0]
        kind = first.device.partition(":")[0]
        machine = replace(
            machine, accelerators=tuple(replace(first, device=f"{kind}:{number}") for number in range(local))
        )
    network = None if link_bytes_per_s is None else link_bytes_per_s * local
    options = {} if network is None else {"network_bytes_per_s": network}
    found = Cluster.of(
        machine,
        num_nodes=max(1, processes.size // local),
        num_per_node=local,
        link_bytes_per_s=link_bytes_per_s,
        **options,
    )
    if swap is not None:
        found = replace(
            found,
            disk_read_bytes_per_s=swap.read_bytes_per_s,
            disk_write_bytes_per_s=swap.write_bytes_per_s,
            disk_limit_bytes=found.disk_limit_bytes + swap.disk_bytes,
        )
    return found if nvme_folder is not None else replace(found, disk_limit_bytes=0)


def _link_bytes_per_s(processes: Processes) -> float | None:
    """Of a ring of all of them, as fast as what they compute on lets them."""
    if processes.size == 1:
        return None
    values = torch.zeros(_SENT_BYTES // 4, device=processes.device)
    seconds = []
    for _ in range(_NUM_SENT):
        processes.wait()
        started_s = time.perf_counter()
        dist.all_reduce(values)
        if processes.device.type != "cpu":
            torch.accelerator.synchronize(processes.device)
        seconds.append(time.perf_counter() - started_s)
    sent = 2 * _SENT_BYTES * (processes.size - 1) / processes.size
    slowest: float = min(processes.gathered(sent / statistics.median(seconds[1:])))
    return slowest


def _takes_zero(origin: Origin, optimizer: Any, config: TrainingConfig) -> bool:
    """Whether DeepSpeed is there, and takes what is given: an optimizer, and one dtype."""
    frozen = {each.dtype for each in origin.module.parameters() if not each.requires_grad and each.is_floating_point()}
    return has_deepspeed() and optimizer is not None and frozen <= {PRECISIONS[config.precision]}


def _kept(config: TrainingConfig, resumes: str | os.PathLike[str] | None, processes: Processes) -> dict[str, Any]:
    """What the run chose that is gone on with, where the configuration leaves it open."""
    if resumes is None:
        return {}
    folder = Path(resumes)
    try:
        manifest: Mapping[str, Any] = read_manifest(folder)
    except MissingFilesError:
        found = complete_ones(folder)
        if not found:  # it begins
            return {}
        manifest = found[0][1]
    chosen = dict(manifest.get("chosen", {}))
    if config.nvme_folder is None and "nvme" in [chosen.get(name) for name in _OF_ENGINES]:
        if config.strategy == "auto":
            logger.info("the run that is gone on with kept values on a disk, and no nvme_folder is given: chosen anew")
            return {}
        for name in _OF_ENGINES:
            chosen.pop(name, None)
    if config.strategy not in ("auto", chosen.get("strategy")):  # what is said of another engine
        for name in _OF_ENGINES:
            chosen.pop(name, None)
    each = None if config.global_batch_size is None else -(-config.global_batch_size // processes.size)
    if each is not None and isinstance(chosen.get("micro_batch_size"), int):
        chosen["micro_batch_size"] = min(chosen["micro_batch_size"], each)
    if manifest.get("num_processes") != processes.size:
        chosen.pop("micro_batch_size", None)
        chosen.pop("replicas", None)
        if processes.size == 1 or chosen.get("strategy") == "single":
            return {}
    stated = {name for name in CHOSEN if getattr(config, name) != getattr(TrainingConfig(), name)}
    fields = {name: value for name, value in chosen.items() if name in CHOSEN and name not in stated}
    if "strategy" not in fields and config.strategy == "auto":
        return {}
    logger.info("as the run that is gone on with: %s", ", ".join(f"{name}={value}" for name, value in fields.items()))
    return fields


def _fields(chosen: Forecast, config: TrainingConfig, of_loader: int | None) -> dict[str, Any]:
    way = chosen.way
    fields: dict[str, Any] = {
        "strategy": way.strategy,
        "reshard_after_forward": way.reshard_after_forward,
        "replicas": way.replicas,
        "offload_optimizer": way.offload_optimizer,
        "offload_params": way.offload_params,
        "activation_checkpointing": "on" if way.checkpoints else "off",
    }
    if of_loader is None and config.micro_batch_size == "auto" and config.global_batch_size is not None:
        fields["micro_batch_size"] = way.micro_batch_size
    return fields


def _longest(source: Source | None) -> dict[str, torch.Tensor] | None:
    """A batch of the sample with most tokens among some, spread over the data; None where none can be asked for by number."""
    if not isinstance(source, Listed) or not source.num_samples:
        return None
    number = min(_NUM_SAMPLES, source.num_samples)
    best: dict[str, torch.Tensor] | None = None
    with draws_kept():
        for place in range(number):
            at = place * (source.num_samples - 1) // max(1, number - 1)  # the first, the last, and between them
            try:
                batch = source.collate_fn([source.dataset[at]])
            except Exception as error:  # what takes no sample alone, or fails later too: not now
                logger.info("sample %d was not looked at: %s: %s", at, type(error).__name__, error)
                return None
            if not isinstance(batch, Mapping) or not all(
                isinstance(each, torch.Tensor) and each.ndim and each.shape[0] == 1 for each in batch.values()
            ):
                return None
            if best is None or sum(each.numel() for each in batch.values()) > sum(
                each.numel() for each in best.values()
            ):
                best = dict(batch)
    return best
