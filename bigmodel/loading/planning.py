"""A plan for a checkpoint or a module, from headers alone: for this machine, or for one that is somewhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.machine import Machine
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.simulation import Step
from bigmodel.errors import InvalidArgumentError
from bigmodel.loading.decision import MOST_SEQUENCES, Decider, DeviceMap
from bigmodel.loading.divisions import Divisions
from bigmodel.loading.prepared import Here, Prepared, refuse_strange
from bigmodel.models import Skeleton
from bigmodel.progress import progress_bar

__all__ = ["make_plan", "make_plan_and_timeline", "workload_of"]

# How a checkpoint is read, where nothing is said.
_READING: dict[str, Any] = {
    "dtype": "auto",
    "offload_folder": None,
    "model": None,
    "no_split_module_classes": None,
    "revision": None,
    "subfolder": None,
    "variant": None,
    "key_mapping": None,
    "strict": True,
    "trust_remote_code": False,
}


def make_plan(
    path_or_model: str | os.PathLike[str] | nn.Module,
    machine: Machine | str | os.PathLike[str] | None = None,
    workload: Workload | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    device_map: DeviceMap = "auto",
    allow_cpu_compute: bool = False,
    *,
    dtype: str | torch.dtype = "auto",
    offload_folder: str | os.PathLike[str] | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    no_split_module_classes: Collection[str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    strict: bool = True,
    trust_remote_code: bool = False,
) -> Plan:
    """The best map that is found for a workload, its peaks and its predicted times, from headers alone.

    Args:
        path_or_model: as in `load_sharded`; a Hub repo id, of which only the headers are fetched; a folder with nothing but
            config.json; or a module, on meta or real.
        machine: the machine to plan for: a Machine, a machine file or the name of one, such as ``"desktop-24gb"``; this one if
            None.
        workload, max_memory, device_map: as in `load_sharded`.
        allow_cpu_compute: beside accelerators, whether units may run on the CPU.
        dtype, offload_folder, model, no_split_module_classes, revision, subfolder, variant, key_mapping, strict,
            trust_remote_code: likewise; of these only `no_split_module_classes` goes with a module.

    Returns:
        A plan, to look at (`explain()`), to keep (`to_json()`), or to load with (`load_sharded(path, device_map=plan)`).

    Raises:
        As `load_sharded`.
    """
    plan, _ = make_plan_and_timeline(
        path_or_model,
        machine,
        workload,
        max_memory,
        device_map,
        allow_cpu_compute,
        dtype=dtype,
        offload_folder=offload_folder,
        model=model,
        no_split_module_classes=no_split_module_classes,
        revision=revision,
        subfolder=subfolder,
        variant=variant,
        key_mapping=key_mapping,
        strict=strict,
        trust_remote_code=trust_remote_code,
    )
    return plan


def make_plan_and_timeline(
    path_or_model: str | os.PathLike[str] | nn.Module,
    machine: Machine | str | os.PathLike[str] | None,
    workload: Workload | None,
    max_memory: Mapping[int | str, int | str] | None,
    device_map: DeviceMap,
    allow_cpu_compute: bool,
    most_sequences: int = MOST_SEQUENCES,
    **reading: Any,
) -> tuple[Plan, Callable[[], list[Step]]]:
    """`make_plan`, whose keyword arguments `reading` are, and what gives the predicted timeline of the plan.

    `most_sequences` limits a batch size that is "auto".
    """
    reading = _READING | reading
    refuse_strange(workload, reading["no_split_module_classes"])
    with torch.inference_mode(False), torch.device("cpu"), progress_bar() as report:
        folder, no_split = reading["offload_folder"], reading["no_split_module_classes"]
        if isinstance(machine, (str, os.PathLike)):
            machine = Machine.load(machine)
        if machine is not None and not isinstance(machine, Machine):
            raise InvalidArgumentError(
                f"machine is a {type(machine).__name__}. Give a Machine, a machine file or the name of one."
            )
        here = Here.of(max_memory, device_map, folder, report, machine, allow_cpu_compute=allow_cpu_compute)
        workload = workload or workload_of(device_map) or Workload()
        if not isinstance(path_or_model, nn.Module):
            own = {name: reading[name] for name in reading if name not in ("offload_folder", "no_split_module_classes")}
            prepared = Prepared.of(path_or_model, here, **own, no_split=no_split, without_weights=True)
            here, decide = prepared.here, prepared.decide
        else:
            given = [name for name in reading if name != "no_split_module_classes" and reading[name] != _READING[name]]
            if given:
                raise InvalidArgumentError(
                    f"{', '.join(given)} say how to read a checkpoint, and a module was given. Leave them out, or give a path."
                )
            named = frozenset(getattr(path_or_model, "_no_split_modules", None) or ())
            skeleton = Skeleton(model=path_or_model, sources={}, initialised=(), unexpected=(), no_split=named)
            decide = Decider(Divisions(skeleton, fingerprint=None, no_split=no_split or (), baseline_bytes=0), report)
        plan = decide(
            device_map,
            here.limits,
            workload,
            here.machine,
            allow_cpu_compute=allow_cpu_compute,
            with_advice=True,
            most_sequences=most_sequences,
        ).plan
        return plan, lambda: decide.timeline(plan, here.machine)


def workload_of(device_map: DeviceMap) -> Workload | None:
    """A plan brings the workload that it was made for."""
    return device_map.workload if isinstance(device_map, Plan) else None
