"""Decides where every unit rests. Pure: costs and limits in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigmodel.device_map.plan import Estimate, Placement, Plan, SlotGroup, Workload
from bigmodel.device_map.unit import Unit
from bigmodel.errors import DeviceMapError, DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["Demand", "UnitCost", "decide"]

# Slots per group of equal units: one is computed with, one is ready, one is being filled.
MAX_SLOTS = 3
# Threads' stacks, the allocator's holes, caches of the interpreter and of oneDNN: what no formula below sees (measured on
# tiny models, where it is all there is: 10-30 MiB).
RESERVE_BYTES = 48 << 20
_MOST_STEPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit takes, wherever it rests.

    Attributes:
        unit: which.
        weight_bytes: in the dtypes that the model has.
        resident_bytes: in host memory, alignment included.
        slot_bytes: of a slot that it can be fetched into.
        staging_bytes: of the buffer that one of its reads goes through, 0 if all go straight into place.
        conversion_bytes: held for a moment while its weights are converted: what goes in, what comes out, and a copy.
        converted_bytes: written to the disk tier where it rests there, because its bytes do not stand in the files.
        can_gather: it may rest on disk without a slot: its rows are looked up in a map of the file.
        must_stay: it cannot stream: it encloses other units, or its weights are in no file.
        is_part: a map divides the unit that it belongs to.
    """

    unit: Unit
    weight_bytes: int
    resident_bytes: int
    slot_bytes: int
    staging_bytes: int = 0
    conversion_bytes: int = 0
    converted_bytes: int = 0
    can_gather: bool = False
    must_stay: bool = False
    is_part: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What has to be in host memory beside the weights, in bytes.

    Attributes:
        kv_bytes: the cache at the workload's last token.
        activation_bytes: the largest that a pass of the workload holds beside it.
        buffer_bytes: the model's buffers.
        baseline_bytes: what the interpreter holds, outside the budget.
    """

    kv_bytes: int
    activation_bytes: int
    buffer_bytes: int
    baseline_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.activation_bytes + self.buffer_bytes + RESERVE_BYTES


def decide(
    costs: Sequence[UnitCost],
    demand: Demand,
    limits: Mapping[str, int],
    workload: Workload,
    *,
    homes: Mapping[str, str] | None = None,
    all_resident: bool = False,
    refuses: bool = True,
    num_readers: int = 1,
    max_slots: int = MAX_SLOTS,
    fingerprint: str = "",
) -> Plan:
    """Where every unit rests.

    Without `homes`, what fits stays resident. When not all fits, tables that are looked up rest on disk first, slots are set
    aside for what streams, the smallest kinds of unit stay first, and the units that stream are spread evenly among
    their like, so that reading goes on while resident ones compute.

    Args:
        costs: of every unit, in order of definition.
        demand: what else is in memory.
        limits: tier -> bytes.
        workload: what `demand` was measured for.
        homes: unit name -> ``"cpu"`` or ``"disk"``, honoured exactly, but for units that must stay.
        all_resident: everything stays, or DoesNotFitError.
        refuses: whether what does not fit is an error; otherwise the plan states what it takes.
        num_readers: threads that read at once; each has a buffer where reads cannot go straight into place.
        max_slots: per group of units.
        fingerprint: of the checkpoint.

    Raises:
        DoesNotFitError: with the tier, what is needed, what there is, and what would do.
    """
    room = limits["cpu"] - demand.total_bytes
    choice: _Choice | None = None
    if homes is not None:
        streamed = [c for c in costs if homes[c.unit.name] != "cpu" and not c.must_stay]
        choice = _with_most_slots(costs, streamed, room, num_readers, max_slots)
    else:
        everything = _Choice.of(costs, [], 0, num_readers)
        if all_resident or everything.total_bytes <= room:
            choice = everything
        else:
            choice = _spread(costs, room, num_readers, max_slots)
    if choice.total_bytes > room and refuses:
        raise _too_large(choice, costs, demand, limits, workload, homes, all_resident)
    return _plan(choice, costs, demand, limits, workload, homes, fingerprint)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which units are away, and the slots for those that stream."""

    away: frozenset[str]
    groups: tuple[SlotGroup, ...]
    resident_bytes: int
    staging_bytes: int

    @property
    def slot_bytes(self) -> int:
        return sum(group.num_slots * group.slot_bytes for group in self.groups)

    @property
    def total_bytes(self) -> int:
        return self.resident_bytes + self.slot_bytes + self.staging_bytes

    @classmethod
    def of(cls, costs: Sequence[UnitCost], away: Sequence[UnitCost], num_slots: int, num_readers: int) -> _Choice:
        names = frozenset(cost.unit.name for cost in away)
        return cls(
            away=names,
            groups=_groups([cost for cost in away if not cost.can_gather], num_slots),
            resident_bytes=sum(cost.resident_bytes for cost in costs if cost.unit.name not in names),
            staging_bytes=num_readers * max((cost.staging_bytes for cost in costs), default=0)
            + max((cost.conversion_bytes for cost in costs), default=0),
        )


def _groups(streamed: Sequence[UnitCost], num_slots: int) -> tuple[SlotGroup, ...]:
    """Units of about one size share slots; in a group the largest is less than twice the smallest."""
    groups: list[list[UnitCost]] = []
    for cost in sorted(streamed, key=lambda cost: -cost.slot_bytes):
        if groups and 2 * cost.slot_bytes > groups[-1][0].slot_bytes:
            groups[-1].append(cost)
        else:
            groups.append([cost])
    order = {cost.unit.name: number for number, cost in enumerate(streamed)}
    return tuple(
        SlotGroup(
            "cpu",
            min(len(group), num_slots),
            group[0].slot_bytes,
            tuple(sorted((cost.unit.name for cost in group), key=order.__getitem__)),
        )
        for group in groups
    )


def _with_most_slots(
    costs: Sequence[UnitCost], away: Sequence[UnitCost], room: int, num_readers: int, max_slots: int
) -> _Choice:
    """The choice with as many slots as fit, one for each group at least."""
    for num_slots in range(max_slots, 1, -1):
        choice = _Choice.of(costs, away, num_slots, num_readers)
        if choice.total_bytes <= room:
            return choice
    return _Choice.of(costs, away, 1, num_readers)


def _spread(costs: Sequence[UnitCost], room: int, num_readers: int, max_slots: int) -> _Choice:
    """As many bytes resident as fit beside the slots, beginning with the smallest kinds of unit."""
    most_resident: int | None = None
    for num_slots in range(max_slots, 0, -1):
        least = _least(costs, num_readers, num_slots)
        if least.total_bytes <= room or num_slots == 1:
            return _filled(least, costs, room, num_readers, num_slots, most_resident)
        # With fewer slots no more stays than with more slots at the least room for them: more memory is never used to
        # keep less. What is left over is less than a slot.
        most_resident = _filled(least, costs, least.total_bytes, num_readers, num_slots, most_resident).resident_bytes
    raise AssertionError("max_slots is at least 1")


def _least(costs: Sequence[UnitCost], num_readers: int, num_slots: int) -> _Choice:
    """As little in memory as can be with so many slots. Units that take no more than the slots would, stay."""
    movable = [cost for cost in costs if not cost.must_stay]
    by_name = {cost.unit.name: cost for cost in costs}
    staying: set[str] = set()
    for group in _groups([cost for cost in movable if not cost.can_gather], num_slots):
        resident_bytes = sum(by_name[name].resident_bytes for name in group.units)
        if resident_bytes <= group.num_slots * group.slot_bytes:
            staying.update(group.units)
    return _Choice.of(costs, [cost for cost in movable if cost.unit.name not in staying], num_slots, num_readers)


def _filled(
    least: _Choice,
    costs: Sequence[UnitCost],
    room: int,
    num_readers: int,
    num_slots: int,
    most_resident: int | None,
) -> _Choice:
    """`least`, and what else fits: kind after kind, the next one only when all of the last one stays."""
    by_name = {cost.unit.name: cost for cost in costs}
    kinds = [[by_name[name] for name in group.units] for group in reversed(least.groups)]
    kinds.append([cost for cost in costs if cost.can_gather and not cost.must_stay])
    away, resident_bytes, total_bytes = set(least.away), least.resident_bytes, least.total_bytes
    for kind in kinds:
        chosen: set[str] = set()
        chosen_resident, chosen_total = resident_bytes, total_bytes
        slots_before = _slot_bytes(kind, num_slots)
        for num_staying in _counts(len(kind)):
            kept = _spread_names(kind, num_staying)
            resident = resident_bytes + sum(cost.resident_bytes for cost in kind if cost.unit.name in kept)
            streaming = [cost for cost in kind if cost.unit.name not in kept]
            total = total_bytes + resident - resident_bytes + _slot_bytes(streaming, num_slots) - slots_before
            is_allowed = most_resident is None or resident <= most_resident
            if is_allowed and total <= room and resident >= chosen_resident:
                chosen, chosen_resident, chosen_total = kept, resident, total
        away -= chosen
        resident_bytes, total_bytes = chosen_resident, chosen_total
        if len(chosen) < len(kind):
            break
    return _Choice.of(costs, [cost for cost in costs if cost.unit.name in away], num_slots, num_readers)


def _slot_bytes(streaming: Sequence[UnitCost], num_slots: int) -> int:
    """Bytes of the slots of units of one kind; tables that are looked up have none."""
    sizes = [cost.slot_bytes for cost in streaming if not cost.can_gather]
    return min(len(sizes), num_slots) * max(sizes, default=0)


def _counts(num_units: int) -> list[int]:
    """How many of so many units might stay; not every number where there are very many, which would take seconds."""
    steps = min(num_units, _MOST_STEPS)
    return [step * num_units // steps for step in range(1, steps + 1)]


def _spread_names(kind: Sequence[UnitCost], num_staying: int) -> set[str]:
    """`num_staying` units of a kind, such that the others are spread evenly among them."""
    num_away = len(kind) - num_staying
    away = {(2 * i + 1) * len(kind) // (2 * num_away) for i in range(num_away)} if num_away else set()
    return {cost.unit.name for number, cost in enumerate(kind) if number not in away}


def _plan(
    choice: _Choice,
    costs: Sequence[UnitCost],
    demand: Demand,
    limits: Mapping[str, int],
    workload: Workload,
    homes: Mapping[str, str] | None,
    fingerprint: str,
) -> Plan:
    written = sum(cost.converted_bytes for cost in costs if cost.unit.name in choice.away)
    if written > limits["disk"]:
        raise DoesNotFitError(
            f"Weights that must be converted before they can stream take {format_bytes(written)} of disk, and "
            f"{format_bytes(limits['disk'])} may be used. Raise max_memory['disk'], or keep more in host memory.",
            tier="disk",
            needed_bytes=written,
            available_bytes=limits["disk"],
        )
    kept = [c.unit.name for c in costs if homes is not None and c.must_stay and homes[c.unit.name] != "cpu"]
    notes = (f"these stay in host memory, because other units run inside them: {', '.join(kept)}",) if kept else ()
    placements = tuple(
        Placement(
            unit=cost.unit.name,
            home="disk" if cost.unit.name in choice.away else "cpu",
            run_on="cpu",
            prefill_on="cpu",
            weight_bytes=cost.weight_bytes,
            parameters=cost.unit.parameters if cost.is_part else (),
        )
        for cost in costs
    )
    return Plan(
        placements=placements,
        slots=choice.groups,
        workload=workload,
        limits=dict(limits),
        resident_bytes=choice.resident_bytes,
        buffer_bytes=demand.buffer_bytes,
        staging_bytes=choice.staging_bytes,
        kv_bytes=demand.kv_bytes,
        activation_bytes=demand.activation_bytes,
        reserve_bytes=RESERVE_BYTES,
        estimate=Estimate(
            peak_bytes={"cpu": choice.total_bytes + demand.total_bytes, "disk": written},
            baseline_bytes=demand.baseline_bytes,
        ),
        fingerprint=fingerprint,
        notes=notes,
    )


def _too_large(
    choice: _Choice,
    costs: Sequence[UnitCost],
    demand: Demand,
    limits: Mapping[str, int],
    workload: Workload,
    homes: Mapping[str, str] | None,
    all_resident: bool,
) -> DoesNotFitError:
    needed, limit = choice.total_bytes + demand.total_bytes, limits["cpu"]
    parts = [f"{format_bytes(choice.resident_bytes)} of weights that stay"]
    if choice.groups:
        largest = max(choice.groups, key=lambda group: group.slot_bytes)
        unit = f"the largest unit, {largest.units[0]}, needs {format_bytes(largest.slot_bytes)}"
        parts.append(f"{format_bytes(choice.slot_bytes)} of slots ({unit})")
    parts.append(f"{format_bytes(demand.kv_bytes)} of KV cache")
    parts.append(f"{format_bytes(demand.activation_bytes + demand.buffer_bytes)} of activations and buffers")
    parts.append(f"{format_bytes(RESERVE_BYTES + choice.staging_bytes)} of reserve and read buffers")
    advice = [f"Raise max_memory['cpu'] to {_at_least(needed)}"]
    if all_resident or (homes is not None and any(home == "cpu" for home in homes.values())):
        advice.append("let weights rest on disk (device_map='auto')")
    if demand.kv_bytes + demand.activation_bytes >= needed - limit and workload.batch_size * workload.total_tokens > 1:
        advice.append("state a smaller workload")
    return DoesNotFitError(
        f"The model needs {format_bytes(needed)} of host memory, and {format_bytes(limit)} may be used: "
        f"{'; '.join(parts)}. {', or '.join(advice)}.",
        tier="cpu",
        needed_bytes=needed,
        available_bytes=limit,
    )


def _at_least(num_bytes: int) -> str:
    """A size that is at least `num_bytes` when it is read back: whole MiB."""
    return f"{-(-num_bytes // (1 << 20))}MiB"


def refuse_accelerators(homes: Mapping[str, str]) -> None:
    """This version computes on the CPU."""
    named = sorted({home for home in homes.values() if home not in ("cpu", "disk")})
    if named:
        raise DeviceMapError(
            f"device_map names {', '.join(named)}, and this version runs on the CPU. Use 'cpu' and 'disk'."
        )
