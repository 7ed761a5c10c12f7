"""From a model without weights, and what may be used, to a plan: new, or one that was made before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.device_map.cost import measure
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.maps import divide_by_home, resolve_map
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.planner import Demand, UnitCost, decide, refuse_accelerators
from bigmodel.device_map.trial import Trial
from bigmodel.device_map.unit import Unit, find_units
from bigmodel.errors import DeviceMapError, DoesNotFitError
from bigmodel.loading.assembly import layout_of
from bigmodel.loading.pass_limit import PassLimit
from bigmodel.models import Skeleton, example_inputs
from bigmodel.offload.arena import ALIGN_BYTES
from bigmodel.offload.resident import NUM_READERS

__all__ = ["Decider", "Decision", "DeviceMap", "refuse_unknown"]

DeviceMap = str | Mapping[str, Any] | Plan

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_GUESSED = "activations and KV cache are estimates, because no pass could be tried ({reason})"


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, the units that it places, and what a pass is checked with."""

    plan: Plan
    units: tuple[Unit, ...]
    check_pass: PassLimit


class Decider:
    """Makes decisions about one model.

    Args:
        skeleton: the model, and where its bytes are.
        fingerprint: of the checkpoint; None where a module is planned for by itself, and its parameters' sizes count.
        no_split: class names of modules that are never divided.
        baseline_bytes: what the interpreter holds, outside the budget.
    """

    def __init__(
        self, skeleton: Skeleton, *, fingerprint: str | None, no_split: Collection[str], baseline_bytes: int
    ) -> None:
        self._trial = Trial(skeleton.model)
        # Its twin's shape is what is decided about, also when the model has its weights, its hooks and its adapters.
        self._skeleton = replace(skeleton, model=self._trial.twin)
        self._fingerprint = fingerprint
        self._no_split = frozenset(no_split)
        self._baseline_bytes = baseline_bytes
        self._parameters = dict(self._skeleton.model.named_parameters())

    def __call__(
        self,
        device_map: DeviceMap,
        limits: Mapping[str, int],
        workload: Workload,
        machine: Machine,
        *,
        is_loaded: bool = False,
    ) -> Decision:
        """Where every unit rests.

        Args:
            device_map: as the user gave it.
            limits: tier -> bytes.
            workload: what must fit beside the weights.
            machine: whose tiers are meant.
            is_loaded: all weights are in memory already: the plan says what that takes, and refuses nothing.

        Raises:
            DeviceMapError: names or tiers that are not there, or a plan of something else.
            DoesNotFitError: a limit is too small, however finely the model is divided.
        """
        refuse_unknown(device_map)
        model = self._skeleton.model
        costs = measure(self._trial, model, self._example_inputs, workload)
        demand = Demand(
            kv_bytes=costs.kv_bytes(workload.batch_size, workload.total_tokens),
            activation_bytes=costs.workload_activation_bytes,
            buffer_bytes=sum(0 if buffer.is_meta else buffer.nbytes for buffer in model.buffers()),
            baseline_bytes=self._baseline_bytes,
        )

        settle = functools.partial(self._settle, demand, limits, workload)

        def settled(plan: Plan, units: tuple[Unit, ...]) -> Decision:
            if not costs.is_measured:
                plan = replace(plan, notes=(*plan.notes, _GUESSED.format(reason=costs.reason)))
            return Decision(plan, units, PassLimit(costs, plan, self._trial, self._planned_shapes(workload)))

        if isinstance(device_map, Plan):
            return settled(*self._follow(device_map, settle))
        error: DoesNotFitError | None = None
        for units in self._divisions():
            homes = None
            whole_units = {unit.name for unit in units}
            if isinstance(device_map, Mapping):
                by_parameter = resolve_map(device_map, units, self._known_names(), machine)
                refuse_accelerators(by_parameter)
                units, homes = divide_by_home(units, by_parameter)
            try:
                all_resident = (
                    is_loaded or device_map == "cpu" or (homes is not None and set(homes.values()) == {"cpu"})
                )
                plan = settle(units, whole_units, homes=homes, all_resident=all_resident, refuses=not is_loaded)
            except DoesNotFitError as too_large:
                # Smaller units need smaller slots; what is told is what the finest division would need.
                error = too_large
                if device_map == "cpu":
                    break
            else:
                return settled(plan, units)
        assert error is not None
        raise error

    def _settle(
        self,
        demand: Demand,
        limits: Mapping[str, int],
        workload: Workload,
        units: Sequence[Unit],
        whole_units: Collection[str],
        **choices: Any,
    ) -> Plan:
        """The planner's decision about these units; `choices` are its own."""
        costs = [self._cost_of(unit, whole_units) for unit in units]
        fingerprint = self._fingerprint or ""
        return decide(costs, demand, limits, workload, num_readers=NUM_READERS, fingerprint=fingerprint, **choices)

    def _follow(self, plan: Plan, settle: Callable[..., Plan]) -> tuple[Plan, tuple[Unit, ...]]:
        """A plan that was made before: refused where it is another checkpoint's, or does not fit here and now."""
        if plan.fingerprint and plan.fingerprint != (self._fingerprint or ""):
            raise DeviceMapError(
                f"The plan was made for another checkpoint (fingerprint {plan.fingerprint[:12]}, this one has "
                f"{(self._fingerprint or '')[:12]}). Make one with bigmodel.make_plan(path)."
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
        max_slots = max((group.num_slots for group in plan.slots), default=1)
        return settle(units, names, homes=homes, max_slots=max_slots), units

    def _divisions(self) -> Iterator[tuple[Unit, ...]]:
        """The model's units; then finer and finer ones, as far as there are any."""
        model = self._skeleton.model
        sizes = {name: source.nbytes for name, source in self._skeleton.sources.items()}
        units = find_units(model, sizes=sizes, no_split=self._no_split)
        yield units
        while True:
            largest = max(
                (sum(sizes.get(name, 0) for name in unit.parameters) for unit in units if not unit.encloses), default=0
            )
            finer = find_units(model, sizes=sizes, max_unit_bytes=max(1, largest // 2), no_split=self._no_split)
            if len(finer) <= len(units) or largest <= 1:
                return
            units = finer
            yield units

    def _cost_of(self, unit: Unit, whole_units: Collection[str]) -> UnitCost:
        weight_bytes = sum(self._parameters[name].nbytes for name in unit.parameters)
        is_part = unit.name not in whole_units
        if self._fingerprint is None:
            return UnitCost(
                unit=unit,
                weight_bytes=weight_bytes,
                resident_bytes=weight_bytes,
                slot_bytes=weight_bytes,
                can_gather=unit.gathers,
                must_stay=unit.encloses,
                is_part=is_part,
            )
        sources = [self._skeleton.sources[name] for name in unit.parameters if name in self._skeleton.sources]
        layout = layout_of(sources)
        # What the checkpoint does not have was initialised, and stays.
        initialised_bytes = sum(
            self._parameters[name].nbytes for name in unit.parameters if name not in self._skeleton.sources
        )
        converted = [source for source in sources if source.conversion is not None]
        # Converted weights stream from a cache file, where each begins within a page of where the last one ends.
        converted_bytes = sum(source.nbytes + ALIGN_BYTES for source in converted)
        return UnitCost(
            unit=unit,
            weight_bytes=weight_bytes,
            # All that stays is read as one, where a run of reads may begin in the gap before it.
            resident_bytes=layout.nbytes + 2 * ALIGN_BYTES * layout.num_runs + converted_bytes + initialised_bytes,
            slot_bytes=layout.nbytes + converted_bytes + ALIGN_BYTES * bool(converted),
            staging_bytes=layout.staging_bytes,
            conversion_bytes=max((_conversion_bytes(source) for source in converted), default=0),
            converted_bytes=converted_bytes,
            can_gather=unit.gathers
            and all(source.is_view for source in sources)
            and len(sources) == len(unit.parameters),
            must_stay=unit.encloses or len(sources) < len(unit.parameters) or not sources,
            is_part=is_part,
        )

    def _known_names(self) -> list[str]:
        model = self._skeleton.model
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return names + [name for name, _ in model.named_buffers(remove_duplicate=False)]

    def _example_inputs(self, batch_size: int, num_tokens: int) -> dict[str, torch.Tensor] | None:
        return example_inputs(self._skeleton.model, batch_size, num_tokens)

    def _planned_shapes(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs that the workload's passes were tried with."""
        with torch.device("meta"):
            inputs = self._example_inputs(workload.batch_size, workload.prompt_tokens) or {}
        return {name: tuple(tensor.shape) for name, tensor in inputs.items()}


def refuse_unknown(device_map: DeviceMap) -> None:
    """DeviceMapError for what is no map, and for a map that needs an accelerator."""
    if not isinstance(device_map, (str, Mapping, Plan)):
        raise DeviceMapError(f"device_map is a {type(device_map).__name__}. Give a string, a dict or a Plan.")
    if isinstance(device_map, str) and device_map not in (*_AUTOMATIC, "cpu", "cuda"):
        raise DeviceMapError(
            f"device_map is {device_map!r}. Give 'auto', 'balanced', 'balanced_low_0', 'sequential', 'cpu', 'cuda', a dict of "
            "module names to tiers, or a Plan."
        )
    if device_map == "cuda":
        raise DeviceMapError(
            "device_map='cuda' wants everything on an accelerator, and this version runs on the CPU. Use 'auto' or 'cpu'."
        )


def _conversion_bytes(source: Source) -> int:
    """What goes in, what comes out, and a copy of that, while a conversion runs."""
    assert source.conversion is not None
    return sum(spec.nbytes for spec in source.conversion.inputs) + 2 * len(source.conversion.outputs) * source.nbytes
