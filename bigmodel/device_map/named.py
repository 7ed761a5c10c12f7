"""What the names of maps mean to those who know them from Accelerate: weights in order of definition, device after device.

Accelerate fills by bytes alone and gives up a device when one block does not fit. Here the cache of each unit counts, a
share is only as even as everything on the accelerators allows, and what is left over goes to the host and to disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bigmodel.device_map.demand import CONTEXT_BYTES, Costs, UnitCost
from bigmodel.device_map.machine import Machine

__all__ = ["NAMED", "homes_of"]

NAMED = ("balanced", "balanced_low_0", "sequential")
# A share is found to so many bytes.
_GRAIN = 1 << 20


def homes_of(name: str, costs: Costs, machine: Machine, limits: Mapping[str, int], *, num_slots: int) -> dict[str, str]:
    """Unit name -> tier.

    Args:
        name: one of `NAMED`. "sequential" fills the first accelerator before the next; "balanced" gives each the same, as far as
            its limit goes; "balanced_low_0" does so for all but the first, which gets as little as can be.
        costs, machine, limits: of the problem; a limit of 0 leaves a device out.
        num_slots: set aside on each accelerator where not everything fits.
    """
    devices = [each.device for each in machine.accelerators if limits.get(each.device, 0) > 0]
    beside = CONTEXT_BYTES + costs.demand.device_activation_bytes + costs.demand.buffer_bytes
    rooms = [max(0, limits[device] - beside) for device in devices]
    units = costs.units
    if _fill(units, rooms) < len(units):
        return _left_over(units, devices, rooms, limits, num_slots)
    if name == "balanced":
        share = _least_share(units, rooms, first=0)
        rooms = [min(room, share) for room in rooms]
    elif name == "balanced_low_0" and len(rooms) > 1:
        low, high = -1, -(-rooms[0] // _GRAIN)
        while high - low > 1:  # the least of the first device with which everything still fits
            middle = (low + high) // 2
            low, high = (low, middle) if _fill(units, [middle * _GRAIN, *rooms[1:]]) == len(units) else (middle, high)
        rooms[0] = min(rooms[0], high * _GRAIN)
        share = _least_share(units, rooms, first=1)
        rooms = [rooms[0], *(min(room, share) for room in rooms[1:])]
    homes: dict[str, str] = {}
    start = 0
    for device, room in zip(devices, rooms, strict=True):
        end = start + _fill(units[start:], [room])
        homes |= {unit.unit.name: device for unit in units[start:end]}
        start = end
    return homes


def _fill(units: Sequence[UnitCost], rooms: Sequence[int]) -> int:
    """How many units fit in order of definition, device after device."""
    number = 0
    for room in rooms:
        while number < len(units) and units[number].slot_bytes + units[number].kv_bytes <= room:
            room -= units[number].slot_bytes + units[number].kv_bytes
            number += 1
    return number


def _least_share(units: Sequence[UnitCost], rooms: Sequence[int], *, first: int) -> int:
    """The smallest limit for all devices from `first` on with which everything fits."""
    low, high = 0, -(-max(rooms[first:]) // _GRAIN)
    while high - low > 1:
        middle = (low + high) // 2
        shares = [*rooms[:first], *(min(room, middle * _GRAIN) for room in rooms[first:])]
        low, high = (low, middle) if _fill(units, shares) == len(units) else (middle, high)
    return high * _GRAIN


def _left_over(
    units: Sequence[UnitCost], devices: Sequence[str], rooms: Sequence[int], limits: Mapping[str, int], num_slots: int
) -> dict[str, str]:
    """Accelerators beside their slots, then the host, then disk; a unit that does not fit does not stop those after it."""
    slot_bytes = max((unit.slot_bytes for unit in units), default=0)
    left = {device: room - num_slots * slot_bytes for device, room in zip(devices, rooms, strict=True)}
    left["cpu"] = limits.get("cpu", 0) - num_slots * slot_bytes
    homes = {}
    for unit in units:
        for tier, room in left.items():
            size = unit.resident_bytes if tier == "cpu" else unit.slot_bytes + unit.kv_bytes
            if size <= room:
                left[tier] = room - size
                homes[unit.unit.name] = tier
                break
        else:
            homes[unit.unit.name] = "disk"
    return homes
