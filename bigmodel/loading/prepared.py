"""A checkpoint and its module on meta, everything known and nothing read: what plans and models are made from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint import Checkpoint, open_checkpoint, open_unread, refuse_prequantised
from bigmodel.checkpoint.rewritten import default_cache_folder
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.maps import resolve_limits
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.unit import Unit
from bigmodel.errors import InvalidArgumentError, join_some, shown
from bigmodel.footprint import bound_product_cache, footprint_bytes
from bigmodel.loading.assembly import Assembly
from bigmodel.loading.decision import Decider, DeviceMap, refuse_unknown
from bigmodel.loading.divisions import Divisions
from bigmodel.models import (
    Skeleton,
    build_skeleton,
    build_without_weights,
    import_libraries,
    load_generation_config,
)
from bigmodel.offload.link import hold_to
from bigmodel.offload.resident import ResidentLoad
from bigmodel.offload.spill import trim_heap
from bigmodel.progress import Report

__all__ = ["Here", "Prepared", "begin_early", "refuse_strange"]

logger = logging.getLogger("bigmodel.loading")

# Memory is plentiful where the weights would fit this often, and a workload beside them.
_PLENTY, _PLENTY_BYTES = 2, 1 << 30

MaxMemory = Mapping[int | str, int | str]
Begin = Callable[[Checkpoint], ResidentLoad | None]


@dataclass(frozen=True, kw_only=True)
class Here:
    """What may be used here, and what is told while it is.

    Attributes:
        machine: where the model runs.
        limits: tier -> bytes.
        states_host_limit: whether the user stated the host's, so that passes are held to it.
        states_device_limits: the same of accelerators.
        cache_folder: where weights are kept that must be rewritten.
        allowance: what may be written, whoever writes it.
        progress: called with (phase, done bytes, total bytes).
        allow_cpu_compute: beside accelerators, whether units may run on the CPU.
    """

    machine: Machine
    limits: Mapping[str, int]
    states_host_limit: bool
    states_device_limits: bool
    cache_folder: Path
    allowance: DiskAllowance
    progress: Report
    allow_cpu_compute: bool = False

    @classmethod
    def of(
        cls,
        max_memory: MaxMemory | None,
        device_map: DeviceMap,
        offload_folder: str | os.PathLike[str] | None,
        progress: Report,
        machine: Machine | None = None,
        *,
        allow_cpu_compute: bool = False,
    ) -> Here:
        """Limits as the user stated them, as a plan brings them, or as the machine (this one, if None) has them free."""
        cache_folder = _cache_folder(offload_folder)
        machine = machine or Machine.probe(cache_folder)
        if max_memory is None and isinstance(device_map, Plan):
            # Its own limits count, as far as so much is free.
            free = {"cpu": machine.host_bytes, "disk": machine.disk_bytes}
            free |= {each.device: each.memory_bytes for each in machine.accelerators}
            max_memory = {
                tier: min(device_map.limits[tier], size) for tier, size in free.items() if tier in device_map.limits
            }
        limits = resolve_limits(max_memory, machine)
        return cls(
            machine=machine,
            limits=limits,
            states_host_limit=max_memory is not None and "cpu" in max_memory,
            states_device_limits=max_memory is not None,
            cache_folder=cache_folder,
            allowance=DiskAllowance(limits["disk"]),
            progress=progress,
            allow_cpu_compute=allow_cpu_compute,
        )


@dataclass(eq=False, kw_only=True)
class Prepared:
    """A checkpoint and its module on meta: everything known, nothing read."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    decide: Decider
    here: Here
    trust_remote_code: bool
    early: ResidentLoad | None = None

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        here: Here,
        *,
        model: nn.Module | Callable[[], nn.Module] | None,
        dtype: str | torch.dtype,
        key_mapping: Mapping[str, str] | None,
        strict: bool,
        trust_remote_code: bool,
        revision: str | None,
        subfolder: str | None,
        variant: str | None,
        no_split: Collection[str] | None,
        begin: Begin = lambda checkpoint: None,
        without_weights: bool = False,
    ) -> Prepared:
        """Opens the checkpoint and builds its module. `begin` may start to read as soon as the headers are checked.

        `without_weights`: the weights need not be here: a repo's headers, or config.json alone, are enough to plan.
        """
        bound_product_cache()
        import_libraries()
        baseline_bytes = footprint_bytes()
        unread = None
        if without_weights:
            unread = open_unread(path, revision=revision, subfolder=subfolder, variant=variant)
        checkpoint = unread or open_checkpoint(
            path,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            cache_folder=here.cache_folder,
            allowance=here.allowance,
            progress=here.progress,
        )
        refuse_prequantised(checkpoint)
        here = replace(here, machine=here.machine.reading_from(checkpoint.path))
        early = begin(checkpoint)
        try:
            if unread is None or checkpoint.tensors or model is not None:
                skeleton = build_skeleton(
                    checkpoint,
                    model=model,
                    dtype=dtype,
                    key_mapping=dict(key_mapping) if key_mapping else None,
                    strict=strict,
                    trust_remote_code=trust_remote_code,
                )
            else:
                skeleton = build_without_weights(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
        except BaseException:
            if early is not None:
                early.close()
            raise
        _tell_differences(skeleton, checkpoint)
        return cls(
            skeleton=skeleton,
            checkpoint=checkpoint,
            decide=Decider(
                Divisions(
                    skeleton,
                    fingerprint=checkpoint.fingerprint or None,
                    no_split=no_split or (),
                    baseline_bytes=baseline_bytes,
                ),
                here.progress,
            ),
            here=here,
            trust_remote_code=trust_remote_code,
            early=early,
        )

    def load(self, device_map: DeviceMap, workload: Workload | None) -> nn.Module:
        """The model, every weight where the plan puts it. `workload` is None where nobody stated one."""
        here, model = self.here, self.skeleton.model
        early, self.early = self.early, None
        assembly = Assembly(
            model,
            self.skeleton.sources,
            stamps=self.checkpoint.stamps,
            content_key=f"{self.checkpoint.content_key} {json.dumps(self.checkpoint.config, sort_keys=True)}",
            cache_folder=here.cache_folder,
            allowance=here.allowance,
            progress=here.progress,
        )
        try:
            # Before anything of the model runs: a file that cannot be read leaves nothing behind.
            load_generation_config(model, self.checkpoint, trust_remote_code=self.trust_remote_code)
            can_stay = early is not None and early.can_give(
                list(self.skeleton.sources.values()), is_exact=here.states_host_limit
            )
            if early is not None and can_stay and workload is None and not here.states_host_limit:
                # What a pass would take decides nothing, and is tried when asked for. What is kept for that must not hold the
                # model, which would never go then.
                decide, limits, machine = self.decide, here.limits, here.machine

                def decided() -> tuple[Plan, Sequence[Unit]]:
                    decision = decide(device_map, limits, Workload(), machine, is_loaded=True)
                    return decision.plan, decision.units

                assembly.keep_all(early, decided)
                return model
            decision = self.decide(
                device_map,
                here.limits,
                workload or Workload(),
                here.machine,
                allow_cpu_compute=here.allow_cpu_compute,
            )
            trim_heap()  # what planning took is given back before the weights come
            for device in decision.plan.run_devices - {"cpu"} if here.states_device_limits else ():
                hold_to(here.limits[device], torch.device(device))
            places = decision.plan.placements
            on_host = decision.plan.run_devices == {"cpu"}
            stays = on_host and all(placement.home == "cpu" for placement in places)
            check = decision.check_pass if decision.plan.slots or here.states_host_limit or not on_host else None
            unified = {each.device for each in here.machine.accelerators if each.is_unified}
            assembly.carry_out(
                decision.plan, decision.units, check, early if can_stay and stays else None, unified=unified
            )
            return model
        finally:
            if early is not None:
                early.close()


def refuse_strange(workload: Any, no_split_module_classes: Any) -> None:
    """InvalidArgumentError for arguments of a kind that means nothing, before anything is opened."""
    if workload is not None and not isinstance(workload, Workload):
        raise InvalidArgumentError(f"workload is {shown(workload)}. Give a bigmodel.Workload, or None.")
    names = no_split_module_classes
    if names is not None and (
        isinstance(names, (str, bytes))
        or not isinstance(names, Collection)
        or not all(isinstance(name, str) for name in names)
    ):
        raise InvalidArgumentError(
            f"no_split_module_classes is {shown(names)}. Give a list of class names, such as ['LlamaDecoderLayer']."
        )


def _cache_folder(offload_folder: Any) -> Path:
    if offload_folder is None:
        return default_cache_folder()
    wanted = f"offload_folder is {shown(offload_folder)}"
    if not isinstance(offload_folder, (str, os.PathLike)) or "\0" in str(offload_folder):
        raise InvalidArgumentError(f"{wanted}, which is no path. Give a folder.")
    folder = Path(offload_folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise InvalidArgumentError(f"offload_folder is {folder}, which is a file. Give a folder.")
    except OSError as error:
        raise InvalidArgumentError(f"{wanted}, which cannot be looked at: {error.strerror}. Give a folder.") from error
    return folder


def begin_early(
    checkpoint: Checkpoint,
    here: Here,
    device_map: DeviceMap,
    dtype: str | torch.dtype,
) -> ResidentLoad | None:
    """Begin to read the files while the model is built, where it is plain that everything will stay as it is stored.

    Where the host's limit is stated, into private memory: the weights are to count and to stay.
    """
    refuse_unknown(device_map, here.machine)
    specs = checkpoint.tensors.values()
    if not isinstance(device_map, str) or not _is_as_stored(checkpoint, dtype):
        return None
    if device_map != "cpu" and any(here.limits.get(each.device, 0) > 0 for each in here.machine.accelerators):
        return None
    if _PLENTY * sum(spec.nbytes for spec in specs) + _PLENTY_BYTES > here.limits["cpu"]:
        return None
    may_map = not here.states_host_limit
    return ResidentLoad.of_files(specs, stamps=checkpoint.stamps, may_map=may_map, progress=here.progress)


def _tell_differences(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """One line about weights that were initialised or passed over."""
    for names, what in (
        (skeleton.initialised, "are not in the checkpoint and were initialised by the model's own rule"),
        (skeleton.unexpected, "are in the checkpoint and not in the model, and were passed over"),
    ):
        if names:
            logger.warning("%d weights of %s %s: %s", len(names), checkpoint.path, what, join_some(names, limit=20))


def _is_as_stored(checkpoint: Checkpoint, dtype: str | torch.dtype) -> bool:
    """Whether most bytes are of the dtype that the model will have, as far as config.json says."""
    config = checkpoint.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    stated = [str(part.get("dtype") or part.get("torch_dtype")) for part in parts]
    wanted = [each for each in stated if each not in ("None", "auto")] if str(dtype) == "auto" else [str(dtype)]
    sizes: dict[str, int] = {}
    for spec in checkpoint.tensors.values():
        sizes[str(spec.dtype)] = sizes.get(str(spec.dtype), 0) + spec.nbytes
    most = max(sizes, key=lambda name: sizes[name], default="")
    return not wanted or any(each.removeprefix("torch.") == most.removeprefix("torch.") for each in wanted)
