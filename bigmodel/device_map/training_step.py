"""A step of training on weights that stay where a map has them: forward, and backward, which fetches them in reverse order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigmodel.device_map.tables import DISK, Tables

__all__ = ["training_step_s"]


@dataclass(slots=True)
class _Slot:
    """What lies in it, and since when nobody computes with it."""

    unit: int = -1
    free_s: float = 0.0


def training_step_s(tables: Tables, choices: Sequence[int], num_slots: int) -> float | None:
    """Seconds of a step that is not the first: a pass that is recorded, and its backward, in which units are computed again.

    In backward each unit takes so many times its forward as the whole step does beyond its own. A unit that is still in its slot,
    as the last ones are where backward begins, is not fetched again.

    Args:
        tables: whose costs know the work of a step.
        choices: the number of each unit's choice.
        num_slots: of a lane that has so many units.

    Returns:
        None where nobody tried what a step takes.
    """
    work = tables.costs.recorded
    if work is None:
        return None
    order = [u for u, runs in enumerate(tables.runs[0]) if runs]
    device = {u: int(tables.run[0, u, choices[u]]) for u in order}
    forward = {u: float(tables.compute[0, u, choices[u]]) for u in order}
    last = device[order[-1]] if order else 0
    glue_s = float(tables.glue[0, last])
    once = tables.costs.prefill
    for unit in tables.costs.units:
        once = once if unit.prefill is None else once.plus(unit.prefill)
    rates = tables.machine.rates_of(tables.devices[last])
    forward_s = rates.seconds(once)
    again = max(0.0, rates.seconds(work) / forward_s - 1) if forward_s else 0.0
    visits = [(u, forward[u]) for u in order]
    visits += [(-1, glue_s * (1 + again)), *((u, again * forward[u]) for u in reversed(order))]

    lanes: dict[tuple[int, int], list[int]] = {}
    for u in order:
        if tables.is_fetched[0, u, choices[u]]:
            lanes.setdefault((device[u], tables.classes[u]), []).append(u)
    slots = {lane: [_Slot() for _ in range(min(num_slots, len(units)))] for lane, units in lanes.items()}
    lane_of = {u: lane for lane, units in lanes.items() for u in units}
    links: dict[int, float] = {}
    now = disk_s = 0.0
    ends = []
    for _ in range(3):
        before = last
        for u, seconds in visits:
            if u < 0:
                now += seconds
                continue
            now += float(tables.hop[0, before, device[u]]) if before != device[u] else 0.0
            before = device[u]
            if u not in lane_of:
                now += seconds
                continue
            mine = slots[lane_of[u]]
            slot = next((each for each in mine if each.unit == u), None)
            if slot is None:
                slot = min(mine, key=lambda each: each.free_s)
                slot.unit, choice = u, tables.choices[u][choices[u]]
                ready = slot.free_s
                if choice.home == DISK:
                    begin_s = max(disk_s, slot.free_s)
                    ready = disk_s = begin_s + float(tables.read[u, choices[u]])
                copied_bytes = float(tables.copied_bytes[u, choices[u]])
                if copied_bytes:  # through a ring of small buffers, beside the read
                    begin_s = max(links.get(before, 0.0), slot.free_s)
                    ready = max(ready, begin_s + copied_bytes / float(tables.h2d[before]))
                    links[before] = ready
                now = max(now, ready)
            now += seconds
            slot.free_s = now
        ends.append(now)
    return ends[-1] - ends[-2]
