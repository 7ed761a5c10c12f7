"""Decides where every unit rests and what runs it. Pure: costs, a machine and limits in, a plan with its times out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bigmodel.device_map.bounds import bounds
from bigmodel.device_map.demand import RESERVE_BYTES, Costs, UnitCost
from bigmodel.device_map.machine import Machine
from bigmodel.device_map.memory import PHASES
from bigmodel.device_map.named import NAMED
from bigmodel.device_map.plan import MAX_SLOTS, Alternative, Estimate, Placement, Plan, SlotGroup
from bigmodel.device_map.refusal import too_large
from bigmodel.device_map.search import Found, Search
from bigmodel.device_map.simulation import COMPUTATION, Step, simulate
from bigmodel.device_map.tables import DISK, Choice, Ints, Tables
from bigmodel.device_map.training_step import training_step_s
from bigmodel.errors import DeviceMapError
from bigmodel.progress import Report

__all__ = ["advise", "decide", "pass_times", "predict", "timeline"]

_MORE_BYTES = 10**9
_ALTERNATIVES, _TOLD_APART = 4, 1e-3
# Tokens of a pass that checks guesses, as many as anybody guesses at once.
_CHECKED_TOKENS = (1, 2, 3, 5, 9, 17, 25, 33, 49, 65)


def decide(
    costs: Costs,
    machine: Machine,
    limits: Mapping[str, int],
    *,
    homes: Mapping[str, str] | None = None,
    runs: Mapping[str, tuple[str, str]] | None = None,
    all_resident: bool = False,
    allow_cpu_compute: bool = False,
    refuses: bool = True,
    max_slots: int = MAX_SLOTS,
    fingerprint: str = "",
    progress: Report | None = None,
) -> Plan:
    """Where every unit rests and runs, such that the workload takes the least time that the search finds.

    Args:
        costs: of the model, for a workload.
        machine: its rates.
        limits: tier -> bytes; an accelerator that is not there is not used.
        homes: unit name -> tier, honoured exactly, but for units that must stay where they run.
        runs: unit name -> devices that run it in a decode step and in the first pass, likewise; the planner's choice for units
            that it does not name.
        all_resident: every unit rests where it runs, or DoesNotFitError.
        allow_cpu_compute: beside accelerators, whether units may run on the CPU.
        refuses: whether what does not fit is an error; otherwise the plan states what it takes.
        max_slots: per group of units.
        fingerprint: of the checkpoint.
        progress: called with (phase, steps done, steps at most) while a search goes on.

    Raises:
        DoesNotFitError: with the tier, what is needed, what there is, and what would do.
    """
    on_host = allow_cpu_compute or (runs is not None and any("cpu" in pair for pair in runs.values()))
    choices = _choices(costs, machine, limits, homes, all_resident, on_host)
    if runs is not None:
        fixed = [
            [each for each in open_to if each[1:] == runs.get(cost.unit.name, each[1:])]
            for cost, open_to in zip(costs.units, choices, strict=True)
        ]
        choices = [wanted or open_to for wanted, open_to in zip(fixed, choices, strict=True)]
    tables = Tables(costs, machine, choices)
    search = Search(tables, limits, max_slots=max_slots, progress=progress)
    kept = [c.unit.name for c in costs.units if homes is not None and c.must_stay and homes[c.unit.name] == DISK]
    notes = (
        (f"these do not stream, because other units run inside them or they are in no file: {', '.join(kept)}",)
        if kept
        else ()
    )
    found = search.run()
    if not found:
        least = search.least()
        if refuses:
            plan = _plan(tables, search, least, limits, fingerprint, notes, ())
            raise too_large(plan, costs, homes, all_resident, search.memory)
        found = [least]
    return _plan(tables, search, found[0], limits, fingerprint, notes, found[1:])


def predict(plan: Plan, costs: Costs, machine: Machine) -> Estimate:
    """What a plan will take on a machine: a simulation of its reads, copies and computations, in order.

    Args:
        plan: its placements and slots count.
        costs: of the same units, in the same order.
        machine: with its rates.

    Returns:
        Times of the workload that `costs` were measured for, and peaks of every tier.

    Raises:
        DeviceMapError: the plan's units are not those of `costs`, or it names devices that the machine has not.
    """
    tables, search, maps, slots = _of_plan(plan, costs, machine)
    return _estimate(tables, search, maps, slots)


def timeline(plan: Plan, costs: Costs, machine: Machine) -> list[Step]:
    """When each unit of a plan is read, copied and computed, in the first pass and the steps after it."""
    tables, _, maps, slots = _of_plan(plan, costs, machine)
    steps: list[Step] = []
    simulate(tables, maps, slots, record=steps)
    return steps


def pass_times(plan: Plan, costs: Costs, machine: Machine) -> dict[int, float]:
    """Tokens of each sequence -> seconds of a steady pass that takes so many at once.

    What a unit takes is taken to be a line through a step and the first pass; as far as that line goes.
    """
    tables, _, maps, slots = _of_plan(plan, costs, machine)
    step, first = ([array[phase].copy() for array in (tables.compute, tables.glue, tables.hop)] for phase in (1, 0))
    found = {}
    for tokens in _CHECKED_TOKENS:
        if tokens > max(1, costs.workload.prompt_tokens):
            break
        share = (tokens - 1) / max(1, costs.workload.prompt_tokens - 1)
        tables.compute[1], tables.glue[1], tables.hop[1] = (
            at_one + share * (at_all - at_one) for at_one, at_all in zip(step, first, strict=True)
        )
        found[tokens] = float(simulate(tables, maps, slots).step_s[0])
    return found


def advise(plan: Plan, costs: Costs, machine: Machine, *, allow_cpu_compute: bool = False) -> Plan:
    """The plan, knowing what one more GB of each memory tier would save of the workload's predicted time."""
    before = _workload_s(plan)
    if before is None or not plan.slots:
        return plan
    num_slots = max(group.num_slots for group in plan.slots)
    gains = {}
    alike: dict[str, float] = {}  # accelerators that are the same gain the same
    for tier in plan.limits:
        if tier == DISK or not plan.limits[tier]:
            continue
        kind = machine.kind_of(tier, plan.limits[tier])
        if kind in alike:
            gains[tier] = alike[kind]
            continue
        limits = dict(plan.limits) | {tier: plan.limits[tier] + _MORE_BYTES}
        choices = _choices(costs, machine, limits, None, False, allow_cpu_compute)
        tables = Tables(costs, machine, choices)
        current = [tables.numbers[u][_choice(place)] for u, place in enumerate(plan.placements)]
        gains[tier] = alike[kind] = max(0.0, before - Search(tables, limits).go_on(current, num_slots).seconds)
    return replace(plan, gains_s=gains, notes=(*plan.notes, *_cpu_gain(plan, costs, machine, before)))


def _cpu_gain(plan: Plan, costs: Costs, machine: Machine, before: float) -> tuple[str, ...]:
    """What it would save if units were computed on the CPU too, where that is not allowed."""
    if all(place.run_on == place.prefill_on == "cpu" for place in plan.placements):
        return ()
    choices = _choices(costs, machine, plan.limits, None, False, True)
    tables = Tables(costs, machine, choices)
    current = [tables.numbers[u][_choice(place)] for u, place in enumerate(plan.placements)]
    num_slots = max((group.num_slots for group in plan.slots), default=1)
    saved = before - Search(tables, plan.limits).go_on(current, num_slots).seconds
    if saved <= _TOLD_APART * before:
        return ()
    told = f"computing on the CPU too (allow_cpu_compute=True) would save {saved / before:.1%} of the time"
    return (f"{told}; it rounds differently",)


def _choices(
    costs: Costs,
    machine: Machine,
    limits: Mapping[str, int],
    homes: Mapping[str, str] | None,
    all_resident: bool,
    allow_cpu_compute: bool,
) -> list[list[Choice]]:
    """What is open to each unit: where it rests, and what runs it."""
    named_homes = set() if homes is None else set(homes.values())
    accelerators = [
        each.device for each in machine.accelerators if limits.get(each.device, 0) > 0 or each.device in named_homes
    ]
    unified = {each.device for each in machine.accelerators if each.is_unified}
    devices = [*accelerators, *(["cpu"] if allow_cpu_compute or not accelerators else [])]
    has_both_phases = costs.workload.num_steps > 0 and costs.workload.prompt_tokens > 1
    choices = []
    for cost in costs.units:
        open_to = [Choice.at(device, device) for device in devices]
        if not cost.must_stay and not all_resident:
            open_to += [Choice.at(home, device) for device in devices for home in ("cpu", DISK) if home != device]
            can_change = (cost.can_move_cache or not cost.kv_bytes) and "" not in cost.unit.sites
            if "cpu" in devices and has_both_phases and can_change:
                open_to += [Choice("cpu", "cpu", device) for device in accelerators if device not in unified]
        if cost.can_gather and not all_resident and "cpu" not in devices:
            # Rows are looked up where they are: no arithmetic.
            open_to += [Choice.at("cpu", "cpu"), Choice.at(DISK, "cpu")]
        if homes is not None:
            home = homes[cost.unit.name]
            named = [choice for choice in open_to if choice.home == home]
            open_to = named or [choice for choice in open_to if choice.home == choice.run_on == choice.prefill_on]
        choices.append(open_to)
    return choices


def _plan(
    tables: Tables,
    search: Search,
    found: Found,
    limits: Mapping[str, int],
    fingerprint: str,
    notes: tuple[str, ...],
    others: Sequence[Found],
) -> Plan:
    costs, demand = tables.costs, tables.costs.demand
    maps, slots = np.array([found.choices], np.int64), np.array([found.num_slots])
    chosen = [tables.choices[u][number] for u, number in enumerate(found.choices)]
    placements = tuple(
        Placement(
            unit=cost.unit.name,
            **choice._asdict(),
            weight_bytes=cost.weight_bytes,
            parameters=cost.unit.parameters if cost.is_part else (),
        )
        for cost, choice in zip(costs.units, chosen, strict=True)
    )
    return Plan(
        placements=placements,
        slots=_groups(tables, found),
        workload=costs.workload,
        limits=dict(limits),
        resident_bytes=sum(
            cost.resident_bytes for cost, choice in zip(costs.units, chosen, strict=True) if choice.home == "cpu"
        ),
        buffer_bytes=demand.buffer_bytes,
        staging_bytes=costs.num_readers * max((cost.staging_bytes for cost in costs.units), default=0)
        + max((cost.conversion_bytes for cost in costs.units), default=0),
        kv_bytes=demand.kv_bytes,
        activation_bytes=demand.activation_bytes,
        reserve_bytes=RESERVE_BYTES,
        prefill_from_tokens=_prefill_from_tokens(tables, chosen),
        ring_bytes=costs.ring_bytes if search.memory.has_ring(maps)[0] else 0,
        estimate=_estimate(tables, search, maps, slots),
        machine=tables.machine.name,
        rates_from=tables.machine.rates_from,
        fingerprint=fingerprint,
        notes=notes,
        alternatives=_alternatives(tables, found, others),
    )


def _prefill_from_tokens(tables: Tables, chosen: Sequence[Choice]) -> int:
    """Tokens of a pass from which on fetching what steps run on the host takes less time; 0 where nothing changes device.

    What a unit takes is taken to be a line through the first pass and a step.
    """
    moving = [u for u, choice in enumerate(chosen) if choice.run_on != choice.prefill_on]
    if not moving:
        return 0
    workload = tables.costs.workload
    few, many = workload.num_sequences, workload.num_sequences * workload.prompt_tokens
    both = [[Choice.at("cpu", "cpu"), Choice.at("cpu", choice.prefill_on)] for choice in chosen]
    either = Tables(tables.costs, tables.machine, both)
    compute, copied = either.compute[:, moving].sum(axis=1), either.copied_bytes[moving, 1]
    copying = (copied / either.h2d[either.run[0, moving, 1]]).sum()
    tokens = np.arange(few + 1, many + 1)
    share = (tokens - few) / max(1, many - few)
    on_host, on_device = (compute[1, way] + share * (compute[0, way] - compute[1, way]) for way in (0, 1))
    is_less = np.maximum(copying, on_device) <= on_host
    return int(tokens[np.argmax(is_less)]) if is_less.any() else many


def _described(tables: Tables, found: Found) -> str:
    """How many units rest where."""
    counts: dict[str, int] = {}
    for u, number in enumerate(found.choices):
        home, device, first = tables.choices[u][number]
        where = f"on {device}" if home == device else f"from {home} to {device}"
        where += f" (the first pass on {first})" if first != device else ""
        counts[where] = counts.get(where, 0) + 1
    return ", ".join(f"{count} {where}" for where, count in counts.items())


def _alternatives(tables: Tables, found: Found, others: Sequence[Found]) -> tuple[Alternative, ...]:
    """The next best maps that are told apart by more than nothing."""
    told: dict[str, float] = {}
    for each in others:
        if each.seconds > found.seconds * (1 + _TOLD_APART):
            slots = "1 slot" if each.num_slots == 1 else f"{each.num_slots} slots"
            name = f" ({each.what})" if each.what in NAMED else ""
            told.setdefault(f"{_described(tables, each)}, {slots}{name}", each.seconds)
    return tuple(Alternative(what=what, seconds=seconds) for what, seconds in list(told.items())[:_ALTERNATIVES])


def _groups(tables: Tables, found: Found) -> tuple[SlotGroup, ...]:
    """The lanes that have units, and how many slots each of them has."""
    lanes: dict[tuple[str, int], list[UnitCost]] = {}
    for u, number in enumerate(found.choices):
        if tables.is_fetched[:, u, number].any():
            device = tables.devices[tables.fetch_to[u, number]]
            lanes.setdefault((device, tables.classes[u]), []).append(tables.costs.units[u])
    return tuple(
        SlotGroup(
            device,
            min(len(members), found.num_slots),
            max(cost.slot_bytes for cost in members),
            tuple(cost.unit.name for cost in members),
        )
        for (device, _), members in sorted(
            lanes.items(), key=lambda lane: (tables.devices.index(lane[0][0]), lane[0][1])
        )
    )


def _estimate(tables: Tables, search: Search, maps: Ints, slots: Ints) -> Estimate:
    costs, machine = tables.costs, tables.machine
    outcome = simulate(tables, maps, slots, with_busy=True)
    peaks = search.memory.peaks(maps, slots)[0]
    step_s, ttft_s = float(outcome.step_s[0]), float(outcome.ttft_s[0])
    binds = {}
    for phase in ("prefill", "decode"):
        busy = {
            resource: float(seconds[0])
            for (when, resource), seconds in outcome.busy_s.items()
            if when == phase and seconds[0] > 0
        }
        if busy:
            resource = max(busy, key=lambda resource: busy[resource])
            binds[phase] = _named_part(resource, phase, tables, maps) if resource.startswith(COMPUTATION) else resource
    load_s = 0.0
    for u, number in enumerate(maps[0]):
        if tables.choices[u][int(number)].home != DISK:
            cost = costs.units[u]
            load_s += (cost.read_bytes or cost.weight_bytes) / machine.disk_read_bytes_per_s
    names = [*tables.devices, DISK]
    in_phase = {phase: search.memory.peaks(maps, slots, phase)[0] for phase in PHASES}
    batch_size = costs.workload.num_sequences
    least_s, bytes_per_s = bounds(tables, maps, outcome)
    return Estimate(
        peak_bytes={name: int(size) for name, size in zip(names, peaks, strict=True) if size or name in ("cpu", DISK)},
        baseline_bytes=costs.demand.baseline_bytes,
        load_s=load_s,
        ttft_s=ttft_s,
        time_per_token_s=step_s,
        tokens_per_s=batch_size / step_s if step_s > 0 else None,
        binds=binds,
        phase_peak_bytes={
            phase: {name: int(size) for name, size in zip(names, sizes, strict=True) if size}
            for phase, sizes in in_phase.items()
        },
        least_s=least_s,
        bytes_per_s=bytes_per_s,
        train_step_s=training_step_s(tables, maps[0].tolist(), int(slots[0])),
    )


def _named_part(resource: str, phase: str, tables: Tables, maps: Ints) -> str:
    """Of a device's computation the part that takes longest: its memory, its arithmetic, or the number of operators."""
    device = resource.removeprefix(COMPUTATION)
    shares: dict[str, float] = {}
    for u, cost in enumerate(tables.costs.units):
        choice = tables.choices[u][int(maps[0, u])]
        work, ran_on = (cost.prefill, choice.prefill_on) if phase == "prefill" else (cost.decode, choice.run_on)
        if work is not None and ran_on == device:
            for part, seconds in tables.machine.rates_of(device).shares(work).items():
                shares[part] = shares.get(part, 0.0) + seconds
    return f"{max(shares, key=lambda part: shares[part])} of {device}" if shares else resource


def _of_plan(plan: Plan, costs: Costs, machine: Machine) -> tuple[Tables, Search, Ints, Ints]:
    names, known = [place.unit for place in plan.placements], [cost.unit.name for cost in costs.units]
    if names != known:
        raise DeviceMapError(f"The plan places {len(names)} units, and the costs are of {len(known)} others.")
    devices = {"cpu", DISK, *(each.device for each in machine.accelerators)}
    strange = {name for place in plan.placements for name in _choice(place)}
    if strange - devices:
        raise DeviceMapError(
            f"The plan names {', '.join(sorted(strange - devices))}, and the machine has {', '.join(sorted(devices))}."
        )
    tables = Tables(costs, machine, [[_choice(place)] for place in plan.placements])
    slots = max((group.num_slots for group in plan.slots), default=1)
    maps = np.zeros((1, len(names)), np.int64)
    return tables, Search(tables, plan.limits), maps, np.array([slots])


def _choice(place: Placement) -> Choice:
    return Choice(place.home, place.run_on, place.prefill_on)


def _workload_s(plan: Plan) -> float | None:
    estimate = plan.estimate
    if estimate.ttft_s is None or estimate.time_per_token_s is None:
        return None
    return estimate.ttft_s + plan.workload.num_steps * estimate.time_per_token_s
