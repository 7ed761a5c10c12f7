"""What is told where a model does not fit: the tier, what it needs and has, and the smallest change that would do."""

from __future__ import annotations

from collections.abc import Mapping

from bigmodel.device_map.demand import Costs
from bigmodel.device_map.memory import Memory
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.tables import DISK
from bigmodel.errors import DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["too_large"]


def too_large(
    plan: Plan, costs: Costs, homes: Mapping[str, str] | None, all_resident: bool, memory: Memory
) -> DoesNotFitError:
    """What the smallest plan lacks, and the smallest change that would do."""
    peaks = plan.estimate.peak_bytes
    short = {tier: peak - plan.limits.get(tier, 0) for tier, peak in peaks.items() if peak > plan.limits.get(tier, 0)}
    if not short:  # each has what it needs, and the one memory that they share has not
        names = ["cpu", *(each for each in peaks if each not in ("cpu", DISK))]
        needed, limit = sum(peaks[name] for name in names), int(memory.together)
        return DoesNotFitError(
            f"{' and '.join(names)} share one memory, of which the model needs {format_bytes(needed)} and "
            f"{format_bytes(limit)} may be used. Let weights rest on disk (device_map='auto'), or state a smaller workload.",
            tier="cpu",
            needed_bytes=needed,
            available_bytes=limit,
        )
    # Of several the one that lacks the least is told about; all of them are to be enlarged.
    tier = min(short, key=lambda name: (name == DISK, short[name]))
    needed, limit = peaks[tier], plan.limits.get(tier, 0)
    if tier == DISK:
        return DoesNotFitError(
            f"Weights that must be converted before they can stream take {format_bytes(needed)} of disk, and "
            f"{format_bytes(limit)} may be used. Raise max_memory['disk'], or keep more in host memory.",
            tier=DISK,
            needed_bytes=needed,
            available_bytes=limit,
        )
    where = "host memory" if tier == "cpu" else tier
    here = [group for group in plan.slots if group.device == tier]
    stays = sum(
        cost.resident_bytes if tier == "cpu" else cost.slot_bytes
        for cost, place in zip(costs.units, plan.placements, strict=True)
        if place.home == tier
    )
    parts = [f"{format_bytes(stays)} of weights that stay"]
    if here:
        fetched = {name for group in here for name in group.units}
        largest = max((cost for cost in costs.units if cost.unit.name in fetched), key=lambda cost: cost.slot_bytes)
        unit = f"the largest unit, {largest.unit.name}, needs {format_bytes(largest.slot_bytes)}"
        size = sum(group.num_slots * group.slot_bytes for group in here)
        parts.append(f"{format_bytes(size)} of slots ({unit})")
    rest = needed - stays - sum(group.num_slots * group.slot_bytes for group in here)
    if tier == "cpu" and all(place.run_on == place.prefill_on == "cpu" for place in plan.placements):
        activations = plan.activation_bytes + plan.buffer_bytes
        parts.append(f"{format_bytes(plan.kv_bytes)} of KV cache")
        parts.append(f"{format_bytes(activations)} of activations and buffers")
        parts.append(f"{format_bytes(max(0, rest - plan.kv_bytes - activations))} of reserve and read buffers")
    else:
        parts.append(f"{format_bytes(rest)} of KV cache, activations, buffers, context and reserve")
    raised = [f"max_memory[{name!r}] to {_at_least(peaks[name])}" for name in short]
    advice = [f"Raise {' and '.join(raised)}"]
    if all_resident or (homes is not None and any(home != DISK for home in homes.values())):
        advice.append("let weights rest on disk (device_map='auto')")
    workload = plan.workload
    if plan.kv_bytes + plan.activation_bytes >= needed - limit and workload.num_sequences * workload.total_tokens > 1:
        advice.append("state a smaller workload")
    return DoesNotFitError(
        f"The model needs {format_bytes(needed)} of {where}, and {format_bytes(limit)} may be used: "
        f"{'; '.join(parts)}. {', or '.join(advice)}.",
        tier=tier,
        needed_bytes=needed,
        available_bytes=limit,
    )


def _at_least(num_bytes: int) -> str:
    """A size that is at least `num_bytes` when it is read back: whole MiB."""
    return f"{-(-num_bytes // (1 << 20))}MiB"
