"""What has to be decided about a model for one workload on one machine: maps by name and by hand become plans."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bigmodel.device_map.cost import ModelCosts
from bigmodel.device_map.demand import Costs
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.maps import divide_by_home, resolve_map
from bigmodel.device_map.named import NAMED, homes_of
from bigmodel.device_map.plan import MAX_SLOTS, Plan, Workload
from bigmodel.device_map.planner import decide
from bigmodel.device_map.unit import Unit
from bigmodel.errors import DeviceMapError, DoesNotFitError, join_some
from bigmodel.loading.divisions import Divisions
from bigmodel.progress import Report

__all__ = ["Problem"]

# A map that has a name is filled again with smaller limits so many times, where what it left did not suffice.
_NAMED_ATTEMPTS = 6


class Problem:
    """What has to be decided about a model for one workload on one machine; costs are looked up once per division."""

    def __init__(
        self,
        divisions: Divisions,
        progress: Report | None,
        limits: Mapping[str, int],
        workload: Workload,
        machine: Machine,
        allow_cpu_compute: bool,
        is_loaded: bool,
    ) -> None:
        self._divisions, self._progress = divisions, progress
        self._limits, self._workload, self._machine = limits, workload, machine
        self._allow_cpu_compute, self._is_loaded = allow_cpu_compute, is_loaded
        self.measured: ModelCosts = divisions.measure(workload)
        self.tiers = {"cpu", "disk", *(each.device for each in machine.accelerators if each.device in limits)}
        self._costs: dict[tuple[str, ...], Costs] = {}

    def costs_of(self, units: Sequence[Unit], whole_units: Collection[str] | None = None) -> Costs:
        """Of a division of the model."""
        key = tuple(unit.name for unit in units)
        if key not in self._costs:
            self._costs[key] = self._divisions.costs_of(
                units, set(key) if whole_units is None else whole_units, self.measured, self._workload
            )
        return self._costs[key]

    def decide(self, device_map: str | Mapping[str, Any], units: tuple[Unit, ...]) -> tuple[Plan, tuple[Unit, ...]]:
        """A plan by a user's map; a map may divide units."""
        whole_units = {unit.name for unit in units}
        if isinstance(device_map, Mapping):
            by_parameter = resolve_map(device_map, units, self._divisions.known_names(), self._machine)
            self._refuse_left_out(by_parameter)
            units, homes = divide_by_home(units, by_parameter)
            is_on_host = set(homes.values()) == {"cpu"}
            plan = self.settle(
                units,
                whole_units,
                limits=self._limits_of(homes),
                homes=homes,
                runs=self._runs_of_parts(units, homes),
                all_resident=self._is_loaded or is_on_host,
                on_host=is_on_host,
                refuses=not self._is_loaded,
            )
        elif device_map in NAMED and len(self.tiers) > 2:
            plan = self._by_name(device_map, units, whole_units)
        else:
            limits = self._limits
            if device_map == "cuda":
                usable = [each.device for each in self._machine.accelerators if limits.get(each.device, 0) > 0]
                if not usable:
                    raise DeviceMapError(
                        "device_map='cuda' wants everything on an accelerator, and max_memory leaves none to use. Use 'auto' or "
                        "'cpu', or state a limit for one."
                    )
                limits = {tier: size for tier, size in limits.items() if tier in ("cpu", "disk", usable[0])}
            plan = self.settle(
                units,
                whole_units,
                limits=limits,
                all_resident=self._is_loaded or device_map in ("cpu", "cuda"),
                on_host=device_map == "cpu",
                refuses=not self._is_loaded,
            )
        return plan, units

    def _refuse_left_out(self, by_parameter: Mapping[str, str]) -> None:
        strange = {home for home in by_parameter.values() if home not in self.tiers}
        left_out = sorted(strange & {each.device for each in self._machine.accelerators})
        if left_out:
            raise DeviceMapError(
                f"device_map names {', '.join(left_out)}, which max_memory leaves out. State limits there, or leave it out."
            )
        if strange:
            raise DeviceMapError(
                f"device_map names {join_some(sorted(strange))}, and here there is {', '.join(sorted(self.tiers))}."
            )

    def _limits_of(self, homes: Mapping[str, str]) -> dict[str, int]:
        """Where a map names accelerators, those and no others are used."""
        named = set(homes.values()) - {"cpu", "disk"}
        return {tier: size for tier, size in self._limits.items() if not named or tier in named | {"cpu", "disk"}}

    def _runs_of_parts(self, units: Sequence[Unit], homes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Parts of one module run where one of them rests on an accelerator; on the first there is, where none does."""
        limits = self._limits_of(homes)
        usable = [each.device for each in self._machine.accelerators if limits.get(each.device, 0) > 0]
        at_sites: dict[tuple[str, ...], list[str]] = {}
        for unit in units:
            at_sites.setdefault(unit.sites, []).append(unit.name)
        runs: dict[str, tuple[str, str]] = {}
        for parts in at_sites.values():
            if len(parts) > 1 and usable:
                own = [homes[name] for name in parts if homes[name] not in ("cpu", "disk")]
                device = own[0] if own else usable[0]
                runs |= dict.fromkeys(parts, (device, device))
        return runs

    def _by_name(self, name: str, units: Sequence[Unit], whole_units: Collection[str]) -> Plan:
        """A map that has a name. Its own sums are of weights; what else proves to be needed is taken from its limits."""
        limits = dict(self._limits)
        for attempt in range(_NAMED_ATTEMPTS):
            homes = homes_of(name, self.costs_of(units), self._machine, limits, num_slots=MAX_SLOTS)
            try:
                return self.settle(
                    units, whole_units, homes=homes, all_resident=self._is_loaded, refuses=not self._is_loaded
                )
            except DoesNotFitError as error:
                lacking = error.needed_bytes - error.available_bytes
                if attempt == _NAMED_ATTEMPTS - 1 or lacking <= 0 or limits.get(error.tier, 0) <= lacking:
                    raise
                limits[error.tier] -= lacking
        raise AssertionError

    def settle(
        self,
        units: Sequence[Unit],
        whole_units: Collection[str],
        *,
        limits: Mapping[str, int] | None = None,
        on_host: bool = False,
        **choices: Any,
    ) -> Plan:
        """The planner's decision about these units; `choices` are its own. Nothing but the host is used where `on_host`."""
        limits, machine = self._limits if limits is None else limits, self._machine
        if on_host:
            limits = {tier: limits[tier] for tier in ("cpu", "disk")}
            machine = replace(machine, accelerators=())
        find = functools.partial(
            decide,
            self.costs_of(units, whole_units),
            machine,
            limits,
            allow_cpu_compute=self._allow_cpu_compute,
            fingerprint=self._divisions.fingerprint,
            progress=self._progress,
        )
        plan = find(**choices)
        moved = _brought_together(plan, self._divisions.used_together(units) if machine.accelerators else ())
        return plan if moved is None else find(**choices | moved)


def _brought_together(plan: Plan, groups: Sequence[tuple[str, ...]]) -> dict[str, Any] | None:
    """Homes and devices such that units which one module uses at once run where the largest of them does; None where they do."""
    places = {place.unit: place for place in plan.placements}
    homes = {name: place.home for name, place in places.items()}
    runs = {name: (place.run_on, place.prefill_on) for name, place in places.items()}
    before = dict(runs)
    for group in groups:
        if len({runs[name] for name in group}) == 1:
            continue
        _, device = runs[max(group, key=lambda name: places[name].weight_bytes)]
        for name in group:
            if homes[name] in runs[name]:
                homes[name] = device
            runs[name] = device, device
    return None if runs == before else {"homes": homes, "runs": runs}
