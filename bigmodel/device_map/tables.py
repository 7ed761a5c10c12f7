"""Costs on a machine, laid out in arrays: what each choice that is open to each unit takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigmodel.device_map.demand import Costs, UnitCost
from bigmodel.device_map.machine import Machine

__all__ = ["DISK", "Choice", "Floats", "Ints", "Tables", "size_classes"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DISK = "disk"
# What handing the hidden state to another device takes beside its bytes: two queues and an event.
_HOP_S = 30e-6
# A row that is looked up in a map of a file: one page from the disk (measured on NVMe: 80-120 us), several at a time.
_ROW_S = 40e-6


class Choice(NamedTuple):
    """Where a unit rests, and what computes it in a decode step and in the first pass."""

    home: str
    run_on: str
    prefill_on: str

    @classmethod
    def at(cls, home: str, device: str) -> Choice:
        """Computed by one device in all passes."""
        return cls(home, device, device)


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


class Tables:
    """What every choice takes. A map is one number for each unit, which counts in these choices.

    Args:
        costs: of the model.
        machine: with its rates.
        choices: per unit, what is open to it; a unit runs where it rests, or is fetched.

    Attributes:
        devices: "cpu", then the machine's accelerators; numbers of devices count in these.
        numbers: per unit, the number of each choice.
        classes: per unit, which of `num_classes` it is of; units of a class and a device share a lane of slots.
        home: [units, choices] number of the device that it rests on; -1 is the disk.
        run: [phases, units, choices] number of the device that runs it; the phases are prefill and decode.
        is_fetched: [phases, units, choices].
        fetch_to: [units, choices] number of the device that it is fetched to, where it is; else of the one that runs it.
        compute: [phases, units, choices] seconds.
        read: [units, choices] seconds of the disk.
        copied_bytes: [units, choices] over the link of the device that it is fetched to.
        runs: [phases, units] whether a unit runs in it.
        glue: [phases, devices] seconds of what is done outside all units.
        hop: [phases, from, to] seconds that the hidden state takes.
        h2d: [devices] bytes/s.
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
        self.home: Ints = np.full(shape, -2, np.int64)
        self.run: Ints = np.zeros((2, *shape), np.int64)
        self.is_fetched = np.zeros((2, *shape), bool)
        self.fetch_to: Ints = np.zeros(shape, np.int64)
        self.compute: Floats = np.zeros((2, *shape))
        self.read: Floats = np.zeros(shape)
        self.copied_bytes: Floats = np.zeros(shape)
        rates = [machine.rates_of(device) for device in self.devices]
        rows = costs.workload.num_sequences * costs.workload.prompt_tokens, costs.workload.num_sequences
        kinds = [rates.index(each) for each in rates]  # accelerators that are alike
        for u, unit in enumerate(costs.units):
            times = []
            for work in (unit.prefill, unit.decode):
                alike = {kind: 0.0 if work is None else rates[kind].seconds(work) for kind in set(kinds)}
                times.append([alike[kind] for kind in kinds])
            for c, choice in enumerate(self.choices[u]):
                home = choice.home
                self.home[u, c] = -1 if home == DISK else number[home]
                self.fetch_to[u, c] = number[choice.run_on]
                for phase, device in ((1, choice.run_on), (0, choice.prefill_on)):
                    at = self.run[phase, u, c] = number[device]
                    is_row_lookup = unit.can_gather and home == DISK and device == "cpu"
                    is_there = home == device or is_row_lookup or (device in unified and home == "cpu")
                    self.compute[phase, u, c] = times[phase][at] + (is_row_lookup * _ROW_S * rows[phase])
                    self.is_fetched[phase, u, c] = not is_there
                    if is_there:
                        continue
                    self.fetch_to[u, c] = at
                    if home == DISK:
                        self.read[u, c] = (unit.read_bytes or unit.slot_bytes) / machine.disk_read_bytes_per_s
                    if device != "cpu" and device not in unified:
                        self.copied_bytes[u, c] = unit.slot_bytes
                if choice.run_on != choice.prefill_on and unit.kv_bytes:
                    # What the prompt left in the cache goes home when the unit is done.
                    rate = machine.accelerators[number[choice.prefill_on] - 1].h2d_bytes_per_s
                    self.compute[0, u, c] += _HOP_S + unit.kv_bytes * costs.demand.prompt_share / rate
        self.runs = np.array([[unit.prefill is not None, unit.decode is not None] for unit in costs.units], bool).T
        self.glue: Floats = np.array([[rate.seconds(work) for rate in rates] for work in (costs.prefill, costs.decode)])
        self.hop = self._hops(rows)
        self.h2d = np.array([np.inf, *(each.h2d_bytes_per_s for each in machine.accelerators)])

    def choice_in(self, current: Ints, unit: int) -> Choice:
        """What a map says of a unit."""
        return self.choices[unit][int(current[unit])]

    def copy_seconds(self, fetch_to: Ints, copied_bytes: Floats) -> Floats:
        """What units take on their links; links that are used together share what they reach together, by their own rates.

        Args:
            fetch_to, copied_bytes: [units, maps].
        """
        seconds: Floats = copied_bytes / self.h2d[fetch_to]
        together = self.machine.h2d_bytes_per_s_all
        if not np.isfinite(together) or len(self.devices) < 3:
            return seconds
        asked: Floats = np.zeros(fetch_to.shape[1])
        for d in range(1, len(self.devices)):
            is_used = ((fetch_to == d) & (copied_bytes > 0)).any(axis=0)
            asked += np.where(is_used & np.isfinite(self.h2d[d]), self.h2d[d], 0.0)
        shared: Floats = seconds * np.maximum(1.0, asked / together)
        return shared

    def _hops(self, rows: tuple[int, int]) -> Floats:
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
