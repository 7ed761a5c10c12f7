"""A checkpoint and its module on meta, everything known and nothing read: what plans and models are made from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.assembly import Assembly, layout_of, mark_streamed
from bigmodel.checkpoint import Checkpoint, open_checkpoint, refuse_prequantised
from bigmodel.checkpoint.rewritten import default_cache_folder
from bigmodel.checkpoint.spec import Source
from bigmodel.device_map.cost import ModelCosts, measure
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.maps import divide_by_home, resolve_limits, resolve_map
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.planner import Demand, UnitCost, decide, refuse_accelerators
from bigmodel.device_map.unit import Unit, find_units
from bigmodel.errors import CheckpointError, DeviceMapError, DoesNotFitError
from bigmodel.footprint import footprint_bytes
from bigmodel.models import Skeleton, build_skeleton, example_inputs, import_libraries, load_generation_config
from bigmodel.offload.arena import ALIGN_BYTES
from bigmodel.offload.reader import FileStamp, stamp_files
from bigmodel.offload.resident import NUM_READERS, ResidentLoad
from bigmodel.pass_limit import PassLimit

__all__ = ["DeviceMap", "Prepared", "Progress", "begin_early"]

logger = logging.getLogger("bigmodel.loading")

DeviceMap = str | Mapping[str, Any] | Plan
Progress = Callable[[str, int, int], None]
# Memory is plentiful where the weights would fit this often, and a workload beside them.
_PLENTY, _PLENTY_BYTES = 2, 1 << 30
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


_GUESSED = "activations and KV cache are estimates, because no pass could be tried ({reason})"
Begin = Callable[[Checkpoint, Mapping[str, FileStamp]], ResidentLoad | None]


@dataclass(eq=False, kw_only=True)
class Prepared:
    """A checkpoint and its module on meta: everything known, nothing read."""

    skeleton: Skeleton
    checkpoint: Checkpoint | None
    cache_folder: Path
    no_split: frozenset[str]
    trust_remote_code: bool = False
    baseline_bytes: int = 0
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)
    early: ResidentLoad | None = None

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Callable[[], nn.Module] | None = None,
        dtype: str | torch.dtype = "auto",
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        trust_remote_code: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        no_split: Collection[str] | None = None,
        begin: Begin = lambda checkpoint, stamps: None,
    ) -> Prepared:
        """Opens the checkpoint and builds its module. `begin` may start to read as soon as the headers are checked."""
        import_libraries()
        baseline_bytes = footprint_bytes()
        cache_folder = Path(offload_folder) if offload_folder is not None else default_cache_folder()
        checkpoint = open_checkpoint(
            path, revision=revision, subfolder=subfolder, variant=variant, cache_folder=offload_folder
        )
        refuse_prequantised(checkpoint)
        stamps = _stamps(checkpoint)
        early = begin(checkpoint, stamps)
        try:
            skeleton = build_skeleton(
                checkpoint,
                model=model,
                dtype=dtype,
                key_mapping=dict(key_mapping) if key_mapping else None,
                strict=strict,
                trust_remote_code=trust_remote_code,
            )
        except BaseException:
            if early is not None:
                early.close()
            raise
        return cls(
            skeleton=skeleton,
            checkpoint=checkpoint,
            cache_folder=cache_folder,
            no_split=skeleton.no_split | frozenset(no_split or ()),
            trust_remote_code=trust_remote_code,
            baseline_bytes=baseline_bytes,
            stamps=stamps,
            early=early,
        )

    @classmethod
    def of_module(cls, model: nn.Module, no_split: Collection[str] | None) -> Prepared:
        own = getattr(model, "_no_split_modules", None) or ()
        skeleton = Skeleton(model=model, sources={}, initialised=(), unexpected=(), no_split=frozenset(own))
        return cls(
            skeleton=skeleton,
            checkpoint=None,
            cache_folder=default_cache_folder(),
            no_split=skeleton.no_split | frozenset(no_split or ()),
        )

    def plan(
        self,
        *,
        device_map: DeviceMap,
        max_memory: Mapping[int | str, int | str] | None,
        workload: Workload,
        machine: Machine | None = None,
    ) -> Plan:
        machine = machine or Machine.probe(self.cache_folder)
        limits = resolve_limits(max_memory, machine)
        return self._decide(device_map, limits, workload, machine).plan

    def load(
        self,
        *,
        device_map: DeviceMap,
        max_memory: Mapping[int | str, int | str] | None,
        workload: Workload,
        progress: Progress,
    ) -> nn.Module:
        assert self.checkpoint is not None
        load, is_whole_files = self.early, self.early is not None
        self.early = None
        try:
            machine = Machine.probe(self.cache_folder)
            limits = resolve_limits(max_memory, machine)
            assembly = Assembly(
                self.skeleton.model,
                self.skeleton.sources,
                stamps=self.stamps,
                content_key=f"{self.checkpoint.content_key} {json.dumps(self.checkpoint.config, sort_keys=True)}",
                cache_folder=self.cache_folder,
                disk_limit_bytes=limits["disk"],
            )
            decision = self._decide(device_map, limits, workload, machine, is_plentiful=is_whole_files)
            # Before anything of the model runs: a file that cannot be read leaves nothing behind.
            load_generation_config(self.skeleton.model, self.checkpoint, trust_remote_code=self.trust_remote_code)
            stays = all(placement.home == "cpu" for placement in decision.plan.placements)
            if load is not None and not (stays and load.can_give(list(self.skeleton.sources.values()))):
                load.close()
                load = None
            if load is None:
                is_whole_files = False
                load = assembly.begin_resident(
                    assembly.resident_names(decision.plan, decision.units), may_map=False, progress=progress
                )
            check = decision.check_pass if decision.plan.slots or _states_host_limit(max_memory) else None
            assembly.carry_out(decision.plan, decision.units, load, is_whole_files=is_whole_files, check_pass=check)
        finally:
            if load is not None:
                load.close()
        mark_streamed(self.skeleton.model, decision.plan)
        return self.skeleton.model

    def _decide(
        self,
        device_map: DeviceMap,
        limits: Mapping[str, int],
        workload: Workload,
        machine: Machine,
        *,
        is_plentiful: bool = False,
    ) -> _Decision:
        _refuse_unknown(device_map)
        if device_map == "cuda":
            raise DeviceMapError(
                "device_map='cuda' wants everything on an accelerator, and this version runs on the CPU. Use 'auto' or 'cpu'."
            )
        costs = measure(self.skeleton.model, self._example_inputs, workload, is_plentiful=is_plentiful)
        demand = Demand(
            kv_bytes=costs.kv_bytes(workload.batch_size, workload.total_tokens),
            activation_bytes=costs.workload_activation_bytes,
            buffer_bytes=sum(_own_bytes(buffer) for buffer in self.skeleton.model.buffers()),
            baseline_bytes=self.baseline_bytes,
        )
        if machine.accelerators:
            logger.warning(
                "this version computes on the CPU; %s is not used",
                ", ".join(each.device for each in machine.accelerators),
            )
        if isinstance(device_map, Plan):
            return self._follow(device_map, costs, demand, limits, workload)
        first_error: DoesNotFitError | None = None
        for units in self._divisions():
            homes = None
            whole_units = {unit.name for unit in units}
            if isinstance(device_map, Mapping):
                by_parameter = resolve_map(device_map, units, self._known_names(), machine)
                refuse_accelerators(by_parameter)
                units, homes = divide_by_home(units, by_parameter)
            try:
                plan = decide(
                    [self._cost_of(unit, whole_units) for unit in units],
                    demand,
                    limits,
                    workload,
                    homes=homes,
                    all_resident=device_map == "cpu" or (homes is not None and set(homes.values()) == {"cpu"}),
                    num_readers=NUM_READERS,
                    fingerprint=self.checkpoint.fingerprint if self.checkpoint else "",
                )
            except DoesNotFitError as error:
                # Smaller units need smaller slots; the error that is told is the one about the whole blocks' smallest division.
                first_error = error
                if device_map == "cpu":
                    break
            else:
                if not costs.is_measured:
                    plan = replace(plan, notes=(*plan.notes, _GUESSED.format(reason=costs.reason)))
                return _Decision(plan, units, PassLimit(costs, plan))
        assert first_error is not None
        raise first_error

    def _follow(
        self, plan: Plan, costs: ModelCosts, demand: Demand, limits: Mapping[str, int], workload: Workload
    ) -> _Decision:
        """A plan that was made before: refused where it is another checkpoint's, or does not fit here and now."""
        fingerprint = self.checkpoint.fingerprint if self.checkpoint else ""
        if plan.fingerprint and plan.fingerprint != fingerprint:
            raise DeviceMapError(
                f"The plan was made for another checkpoint (fingerprint {plan.fingerprint[:12]}, this one has "
                f"{fingerprint[:12]}). Make one with bigmodel.make_plan(path)."
            )
        homes_of = {placement.unit: placement.home for placement in plan.placements}
        parts = {name: placement.home for placement in plan.placements for name in placement.parameters}
        for whole in self._divisions():
            by_parameter = {
                name: parts.get(name) or homes_of.get(unit.name, "") for unit in whole for name in unit.parameters
            }
            units, homes = divide_by_home(whole, by_parameter)
            if {unit.name for unit in units} == homes_of.keys():
                break
        else:
            raise DeviceMapError(
                f"The plan names {len(homes_of)} units that this model is not divided into. Make it again with make_plan."
            )
        refuse_accelerators(homes_of)
        names = {unit.name for unit in whole}
        # Decided again with these homes: the plan's own figures may be of another dtype, workload or machine.
        fresh = decide(
            [self._cost_of(unit, names) for unit in units],
            demand,
            limits,
            workload,
            homes=homes,
            num_readers=NUM_READERS,
            max_slots=max((group.num_slots for group in plan.slots), default=1),
            fingerprint=fingerprint,
        )
        return _Decision(fresh, units, PassLimit(costs, fresh))

    def _divisions(self) -> Iterator[tuple[Unit, ...]]:
        """The model's units; then finer and finer ones, as far as there are any."""
        sizes = {name: source.nbytes for name, source in self.skeleton.sources.items()}
        units = find_units(self.skeleton.model, sizes=sizes, no_split=self.no_split)
        yield units
        while True:
            largest = max(
                (sum(sizes.get(name, 0) for name in unit.parameters) for unit in units if not unit.encloses), default=0
            )
            finer = find_units(
                self.skeleton.model, sizes=sizes, max_unit_bytes=max(1, largest // 2), no_split=self.no_split
            )
            if len(finer) <= len(units) or largest <= 1:
                return
            units = finer
            yield units

    def _cost_of(self, unit: Unit, whole_units: Collection[str]) -> UnitCost:
        parameters = dict(self.skeleton.model.named_parameters())
        weight_bytes = sum(parameters[name].nbytes for name in unit.parameters)
        sources = [self.skeleton.sources[name] for name in unit.parameters if name in self.skeleton.sources]
        if self.checkpoint is None:
            return UnitCost(
                unit=unit,
                weight_bytes=weight_bytes,
                resident_bytes=weight_bytes,
                slot_bytes=weight_bytes,
                can_gather=unit.gathers,
                must_stay=unit.encloses,
                is_part=unit.name not in whole_units,
            )
        layout = layout_of(sources)
        converted = [source for source in sources if source.conversion is not None]
        # Converted weights stream from a cache file, where each begins within a page of where the last one ends.
        converted_bytes = sum(source.nbytes + ALIGN_BYTES for source in converted)
        return UnitCost(
            unit=unit,
            weight_bytes=weight_bytes,
            resident_bytes=layout.nbytes + converted_bytes,
            slot_bytes=layout.nbytes + converted_bytes + ALIGN_BYTES * bool(converted),
            staging_bytes=layout.staging_bytes,
            conversion_bytes=max((_conversion_bytes(source) for source in converted), default=0),
            converted_bytes=converted_bytes,
            can_gather=unit.gathers
            and all(source.is_view for source in sources)
            and len(sources) == len(unit.parameters),
            must_stay=unit.encloses or len(sources) < len(unit.parameters) or not sources,
            is_part=unit.name not in whole_units,
        )

    def _known_names(self) -> list[str]:
        model = self.skeleton.model
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return names + [name for name, _ in model.named_buffers(remove_duplicate=False)]

    def _example_inputs(self, batch_size: int, num_tokens: int) -> dict[str, torch.Tensor] | None:
        return example_inputs(self.skeleton.model, batch_size, num_tokens)


@dataclass(frozen=True, slots=True)
class _Decision:
    """A plan, the units that it places, and what a pass is checked with."""

    plan: Plan
    units: tuple[Unit, ...]
    check_pass: PassLimit


def _conversion_bytes(source: Source) -> int:
    """What goes in, what comes out, and a copy of that, while a conversion runs."""
    assert source.conversion is not None
    return sum(spec.nbytes for spec in source.conversion.inputs) + 2 * len(source.conversion.outputs) * source.nbytes


def _stamps(checkpoint: Checkpoint) -> dict[str, FileStamp]:
    try:
        return stamp_files({spec.file for spec in checkpoint.tensors.values()})
    except OSError as error:
        raise CheckpointError(f"{error.filename} went away while the checkpoint was opened. Open it again.") from error


def begin_early(
    checkpoint: Checkpoint,
    stamps: Mapping[str, FileStamp],
    device_map: DeviceMap,
    max_memory: Mapping[int | str, int | str] | None,
    progress: Progress,
) -> ResidentLoad | None:
    """Begin to read the files while the model is built, where it is plain that everything will stay in memory."""
    if not isinstance(device_map, str) or device_map == "cuda":
        return None
    _refuse_unknown(device_map)
    limit = resolve_limits(max_memory, Machine.probe())["cpu"]
    specs = checkpoint.tensors.values()
    if _PLENTY * sum(spec.nbytes for spec in specs) + _PLENTY_BYTES > limit:
        return None
    return ResidentLoad.of_files(specs, stamps=stamps, progress=progress)


def _states_host_limit(max_memory: Mapping[int | str, int | str] | None) -> bool:
    return max_memory is not None and "cpu" in max_memory


def _own_bytes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.nbytes


def _refuse_unknown(device_map: DeviceMap) -> None:
    if isinstance(device_map, str) and device_map not in (*_AUTOMATIC, "cpu", "cuda"):
        raise DeviceMapError(
            f"device_map is {device_map!r}. Give 'auto', 'balanced', 'balanced_low_0', 'sequential', 'cpu', 'cuda', a dict of "
            "module names to tiers, or a Plan."
        )
    if not isinstance(device_map, (str, Mapping, Plan)):
        raise DeviceMapError(f"device_map is a {type(device_map).__name__}. Give a string, a dict or a Plan.")
