"""A pass after another on disk, links and processors: when each unit is there, and when it is done. For many maps at once.

What the streamer does, as arithmetic: a unit that does not rest where it runs is fetched into the next slot of its lane as soon
as that slot's last unit is done, in the order in which units are needed; from disk to an accelerator it goes through a ring of
host buffers. Units run one after another, wherever they run. One axis of all arrays is the candidate maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bigmodel.device_map.demand import Costs, UnitCost
from bigmodel.device_map.machine import Machine

__all__ = ["COMPUTATION", "DISK", "Choice", "Outcome", "Step", "Tables", "size_classes"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DISK = "disk"
COMPUTATION = "computation on "
RING_SLOTS = 3
# A decode step is what the last two of these take, each; the first is not steady yet.
_NUM_STEPS = 3
# What handing the hidden state to another device takes beside its bytes: two queues and an event.
_HOP_S = 30e-6
# A row that is looked up in a map of a file: one page from the disk (measured on NVMe: 80-120 us), several at a time.
_ROW_S = 40e-6

# (home, device that runs it)
Choice = tuple[str, str]


def size_classes(units: Sequence[UnitCost]) -> list[int]:
    """A number for each unit: units of one number share slots. In a class the largest is less than twice the smallest."""
    numbers = [0] * len(units)
    largest, number = 0, -1
    for index in sorted(range(len(units)), key=lambda index: -units[index].slot_bytes):
        if number < 0 or 2 * units[index].slot_bytes <= largest:
            number += 1
            largest = units[index].slot_bytes
        numbers[index] = number
    return numbers


@dataclass(frozen=True, slots=True)
class Step:
    """What happened to one unit in one pass of one map: seconds since the first pass began.

    Attributes:
        unit: its number.
        number: of the pass; 0 is the prefill.
        device: that ran it.
        read: begin and end of its read from disk, if there was one.
        copy: begin and end of its copy over the link.
        run: begin and end of its computation.
    """

    unit: int
    number: int
    device: str
    read: tuple[float, float] | None
    copy: tuple[float, float] | None
    run: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What maps take.

    Attributes:
        ttft_s: of the first pass, all slots empty before.
        step_s: of a steady decode step.
        busy_s: phase ("prefill", "decode") and resource -> seconds of a pass in which it works.
    """

    ttft_s: Floats
    step_s: Floats
    busy_s: dict[tuple[str, str], Floats] = field(default_factory=dict)


class Tables:
    """Costs on a machine, laid out for the simulation.

    Args:
        costs: of the model.
        machine: with its rates.
        choices: per unit, the (home, run device) pairs that are open to it; a unit runs where it rests, or is fetched. The first
            axis of `simulate`'s maps counts in these.
    """

    def __init__(self, costs: Costs, machine: Machine, choices: Sequence[Sequence[Choice]]) -> None:
        self.costs = costs
        self.machine = machine
        self.choices = [list(each) for each in choices]
        self.numbers = [{choice: number for number, choice in enumerate(each)} for each in self.choices]
        self.devices = ["cpu", *(each.device for each in machine.accelerators)]
        self.classes = size_classes(costs.units)
        self.num_classes = max(self.classes, default=0) + 1
        number = {device: n for n, device in enumerate(self.devices)}
        unified = {each.device for each in machine.accelerators if each.is_unified}
        num_units, widest = len(self.choices), max(map(len, self.choices), default=1)
        shape = (num_units, widest)
        self.home: Ints = np.full(shape, -2, np.int64)  # -1: disk
        self.run: Ints = np.zeros(shape, np.int64)
        self.is_fetched = np.zeros(shape, bool)
        self.is_from_disk = np.zeros(shape, bool)
        self.compute: Floats = np.zeros((2, *shape))
        self.read: Floats = np.zeros(shape)
        self.copied_bytes: Floats = np.zeros(shape)
        rates = [machine.rates_of(device) for device in self.devices]
        rows = costs.workload.num_sequences * costs.workload.prompt_tokens, costs.workload.num_sequences
        for u, unit in enumerate(costs.units):
            work = unit.prefill, unit.decode
            times = [[0.0 if each is None else rate.seconds(each) for rate in rates] for each in work]
            for c, (home, device) in enumerate(self.choices[u]):
                at = number[device]
                is_row_lookup = unit.can_gather and home == DISK and device == "cpu"
                self.home[u, c] = -1 if home == DISK else number[home]
                self.run[u, c] = at
                is_there = home == device or is_row_lookup or (device in unified and home == "cpu")
                self.is_fetched[u, c] = not is_there
                self.is_from_disk[u, c] = not is_there and home == DISK
                for phase in (0, 1):
                    self.compute[phase, u, c] = times[phase][at] + (is_row_lookup * _ROW_S * rows[phase])
                if not is_there:
                    if home == DISK:
                        self.read[u, c] = (unit.read_bytes or unit.slot_bytes) / machine.disk_read_bytes_per_s
                    if device != "cpu" and device not in unified:
                        self.copied_bytes[u, c] = unit.slot_bytes
        self.runs = np.array([[unit.prefill is not None, unit.decode is not None] for unit in costs.units], bool).T
        self.glue = [[rate.seconds(work) for rate in rates] for work in (costs.prefill, costs.decode)]
        self.hop = self._hops(rows)
        self.h2d = np.array([np.inf, *(each.h2d_bytes_per_s for each in machine.accelerators)])

    def choice_in(self, current: Ints, unit: int) -> Choice:
        """What a map says of a unit."""
        return self.choices[unit][int(current[unit])]

    def simulate(self, maps: Ints, num_slots: Ints, record: list[Step] | None = None) -> Outcome:
        """Run the first pass and a few steps.

        Args:
            maps: [candidates, units], the number of each unit's choice.
            num_slots: [candidates], of a lane that has so many units.
            record: filled with what happened in the first candidate's passes.
        """
        num_maps, num_units = maps.shape
        each = np.arange(num_maps)
        columns = np.arange(num_units)
        run, fetched = self.run[columns, maps], self.is_fetched[columns, maps]
        read_s, copy_s = self.read[columns, maps], self._copy_seconds(run, self.copied_bytes[columns, maps])
        lanes = run * self.num_classes + np.array(self.classes)
        num_lanes = len(self.devices) * self.num_classes
        population = np.zeros((num_maps, num_lanes), np.int64)
        for u in range(num_units):
            np.add.at(population, (each[fetched[:, u]], lanes[fetched[:, u], u]), 1)
        lane_slots = np.minimum(population, num_slots[:, None])
        keeps = population <= num_slots[:, None]  # a lane that holds all its units fetches each of them once

        now: Floats = np.zeros(num_maps)
        disk_free: Floats = np.zeros(num_maps)
        link_free: Floats = np.zeros((num_maps, len(self.devices)))
        slot_free: Floats = np.zeros((num_maps, num_lanes, int(num_slots.max(initial=1))))
        slot_next = np.zeros((num_maps, num_lanes), np.int64)
        ring_free: Floats = np.zeros((num_maps, RING_SLOTS))
        ring_next = np.zeros(num_maps, np.int64)
        has_run = np.zeros(num_units, bool)
        busy: dict[tuple[int, str], Floats] = {}
        ends: list[Floats] = []
        any_fetched = [bool(fetched[:, u].any()) for u in range(num_units)]
        for number in range(1 + _NUM_STEPS):
            phase = min(number, 1)
            compute_s = self.compute[phase][columns, maps]
            is_counted = number in (0, _NUM_STEPS)
            at = np.full(num_maps, -1)
            for u in range(num_units):
                if not self.runs[phase, u]:
                    continue
                device = run[:, u]
                ready = now
                begin_read = end_read = begin_copy = end_copy = now
                if any_fetched[u]:
                    lane = lanes[:, u]
                    is_kept = keeps[each, lane] & has_run[u]
                    wanted = fetched[:, u] & ~is_kept
                    slot = slot_next[each, lane]
                    free = slot_free[each, lane, slot]
                    from_disk = wanted & (read_s[:, u] > 0)
                    over_link = wanted & (copy_s[:, u] > 0)
                    both = from_disk & over_link
                    ring = ring_free[each, ring_next]
                    begin_read = np.maximum(disk_free, np.where(both, ring, free))
                    end_read = np.where(from_disk, begin_read + read_s[:, u], 0.0)
                    disk_free = np.where(from_disk, end_read, disk_free)
                    begin_copy = np.maximum(np.maximum(link_free[each, device], end_read), free)
                    end_copy = np.where(over_link, begin_copy + copy_s[:, u], 0.0)
                    link_free[each, device] = np.where(over_link, end_copy, link_free[each, device])
                    ring_free[each, ring_next] = np.where(both, end_copy, ring)
                    ring_next = np.where(both, (ring_next + 1) % RING_SLOTS, ring_next)
                    ready = np.where(wanted, np.maximum(end_read, end_copy), now)
                    if is_counted:
                        _add(busy, (phase, "disk"), np.where(from_disk, read_s[:, u], 0.0))
                        for d in range(1, len(self.devices)):
                            took = np.where(over_link & (device == d), copy_s[:, u], 0.0)
                            _add(busy, (phase, f"link to {self.devices[d]}"), took)
                hop_s = np.where(at < 0, 0.0, self.hop[phase][at, device])
                begin = np.maximum(now + hop_s, ready)
                now = begin + compute_s[:, u]
                at = device
                if is_counted:
                    for d, name in enumerate(self.devices):
                        _add(busy, (phase, f"{COMPUTATION}{name}"), np.where(device == d, compute_s[:, u], 0.0))
                if any_fetched[u]:
                    slot_free[each, lane, slot] = np.where(wanted, now, slot_free[each, lane, slot])
                    advanced = (slot + 1) % np.maximum(lane_slots[each, lane], 1)
                    slot_next[each, lane] = np.where(wanted, advanced, slot)
                has_run[u] = True
                if record is not None:
                    has_read, has_copy = any_fetched[u] and bool(from_disk[0]), any_fetched[u] and bool(over_link[0])
                    record.append(
                        Step(
                            u,
                            number,
                            self.devices[int(device[0])],
                            (float(begin_read[0]), float(end_read[0])) if has_read else None,
                            (float(begin_copy[0]), float(end_copy[0])) if has_copy else None,
                            (float(begin[0]), float(now[0])),
                        )
                    )
            if num_units:
                glue = np.array(self.glue[phase])[np.maximum(at, 0)]
                now = now + glue
                if is_counted:
                    for d, name in enumerate(self.devices):
                        _add(busy, (phase, f"{COMPUTATION}{name}"), np.where(at == d, glue, 0.0))
            ends.append(now)
        names = ("prefill", "decode")
        return Outcome(
            ttft_s=ends[0],
            step_s=(ends[-1] - ends[-3]) / 2,
            busy_s={(names[phase], resource): seconds for (phase, resource), seconds in busy.items()},
        )

    def _copy_seconds(self, run: Ints, copied_bytes: Floats) -> Floats:
        """Links that are used together share what they reach together, by their own rates."""
        seconds: Floats = copied_bytes / self.h2d[run]
        together = self.machine.h2d_bytes_per_s_all
        if not np.isfinite(together) or len(self.devices) < 3:
            return seconds
        is_used = np.zeros((len(run), len(self.devices)), bool)
        for d in range(1, len(self.devices)):
            is_used[:, d] = ((run == d) & (copied_bytes > 0)).any(axis=1)
        asked = np.where(is_used, np.where(np.isfinite(self.h2d), self.h2d, 0.0), 0.0).sum(axis=1)
        shared: Floats = seconds * np.maximum(1.0, asked / together)[:, None]
        return shared

    def _hops(self, rows: tuple[int, int]) -> Floats:
        """[phase, from, to]: seconds that the hidden state takes from a device to another."""
        size = len(self.devices)
        hops: Floats = np.zeros((2, size, size))
        unified = {each.device for each in self.machine.accelerators if each.is_unified}
        for a, source in enumerate(self.devices):
            for b, target in enumerate(self.devices):
                if a == b:
                    continue
                if "cpu" in (source, target):
                    accelerator = self.machine.accelerators[max(a, b) - 1]
                    rate = np.inf if accelerator.device in unified else accelerator.h2d_bytes_per_s
                else:
                    rate = self.machine.d2d_bytes_per_s
                for phase in (0, 1):
                    hops[phase, a, b] = _HOP_S + rows[phase] * self.costs.hidden_bytes / rate
        return hops


def _add(busy: dict[tuple[int, str], Floats], key: tuple[int, str], seconds: Floats) -> None:
    busy[key] = busy[key] + seconds if key in busy else seconds
