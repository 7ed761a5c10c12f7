"""What maps hold: bytes of every tier at the worst moment, for many maps at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bigmodel.device_map.demand import CONTEXT_BYTES, RESERVE_BYTES, Demand
from bigmodel.device_map.tables import DISK, Floats, Ints, Tables

__all__ = ["PHASES", "Memory"]

PHASES = ("load", "prefill", "decode")


class Memory:
    """Peaks of maps, and what of them does not fit.

    Args:
        tables: costs, machine and choices.
        limits: tier -> bytes.

    Attributes:
        limits: [devices and disk] bytes.
        together: bytes of the memory that the host shares with unified devices.
    """

    def __init__(self, tables: Tables, limits: Mapping[str, int]) -> None:
        self._tables = tables
        units = tables.costs.units
        self._columns = np.arange(len(units))
        self.limits: Floats = np.array([limits.get(device, 0) for device in (*tables.devices, DISK)], float)
        unified = {each.device for each in tables.machine.accelerators if each.is_unified}
        self._unified = [n for n, device in enumerate(tables.devices) if device in unified]
        # One memory, whatever part of it a device was granted: all that was granted, but not more than there is.
        granted = self.limits[0] + self.limits[self._unified].sum()
        self.together = min(granted, max(self.limits[0], float(tables.machine.unstated_limit_bytes("cpu"))))
        sizes = np.array([[unit.resident_bytes, unit.slot_bytes] for unit in units], float).reshape(-1, 2)
        home = tables.home
        self._resident: Floats = np.where(home == 0, sizes[:, :1], np.where(home > 0, sizes[:, 1:], 0.0))
        kv = np.array([[unit.kv_bytes] for unit in units], float).reshape(-1, 1)
        self._kv: Floats = np.broadcast_to(kv, home.shape)
        self._slot_bytes = sizes[:, 1]
        self._written = np.array([unit.converted_bytes for unit in units], float)
        self._has_kv = bool(kv.any())
        self._classes = np.array(tables.classes, np.int64)
        self._reading_bytes = tables.costs.num_readers * max((unit.staging_bytes for unit in units), default=0)
        self._reading_bytes += max((unit.conversion_bytes for unit in units), default=0)
        self._kv_beside = max(0, tables.costs.demand.kv_bytes - sum(unit.kv_bytes for unit in units))
        # Rows that are looked up where they rest need no processor's activations.
        gathers = np.array([[unit.can_gather] for unit in units], bool).reshape(-1, 1)

        self._computes = ~(gathers & (tables.run == 0))

    def peaks(self, maps: Ints, num_slots: Ints, phase: str | None = None) -> Floats:
        """Bytes at the worst moment: [candidates, devices and disk], in the order of the tables' devices.

        Args:
            maps, num_slots: as in `simulate`.
            phase: one of `PHASES`; None: whichever it is.
        """
        tables, columns = self._tables, self._columns
        demand = tables.costs.demand
        kv_share, prefill_bytes, decode_bytes, device_bytes = _in_phase(demand, phase)
        num_maps, num_devices = len(maps), len(tables.devices)
        each = np.arange(num_maps)[:, None]
        home, fetch_to = tables.home[columns, maps], tables.fetch_to[columns, maps]
        run = [tables.run[number][columns, maps] for number in (0, 1)]
        fetched = (tables.is_fetched[0] | tables.is_fetched[1])[columns, maps]

        def summed(place: Ints, num_places: int, weights: Floats | None = None) -> Floats:
            flat = (each * num_places + place).ravel()
            total = np.bincount(flat, None if weights is None else weights.ravel(), num_maps * num_places)
            return total.reshape(num_maps, num_places).astype(float)

        # The last place is the disk's, whose number is -1.
        peaks: Floats = summed(home % (num_devices + 1), num_devices + 1, self._resident[columns, maps])
        peaks[:, -1] = (self._written * (home == -1)).sum(axis=1)
        if self._has_kv:
            kv = self._kv[columns, maps]
            peaks[:, :-1] += kv_share * summed(run[1], num_devices, kv)
            if phase != "load" and (run[0] != run[1]).any():
                visiting: Floats = np.where(run[0] != run[1], kv, 0.0)
                for d in range(1, num_devices):  # one unit's at a time, and what it grows to
                    peaks[:, d] += 2 * np.where(run[0] == d, visiting, 0.0).max(axis=1)
        num_lanes = num_devices * tables.num_classes
        # One lane more, for what is in none.
        lane = np.where(fetched, fetch_to * tables.num_classes + self._classes, num_lanes)
        population = summed(lane, num_lanes + 1)[:, :-1]
        largest: Floats = np.zeros(num_maps * (num_lanes + 1))
        np.maximum.at(
            largest, (each * (num_lanes + 1) + lane).ravel(), np.broadcast_to(self._slot_bytes, lane.shape).ravel()
        )
        slots = np.minimum(population, num_slots[:, None]) * largest.reshape(num_maps, -1)[:, :-1]
        peaks[:, :-1] += slots.reshape(num_maps, num_devices, tables.num_classes).sum(axis=2)
        in_prefill, in_decode = (
            summed(run[number], num_devices, self._computes[number][columns, maps].astype(float)) > 0
            for number in (0, 1)
        )
        is_used = in_prefill | in_decode
        beside = CONTEXT_BYTES + device_bytes + demand.buffer_bytes
        peaks[:, 1:-1] += np.where(is_used[:, 1:], beside, 0.0)
        is_alone = ~is_used[:, 1:].any(axis=1)
        peaks[:, 0] += RESERVE_BYTES + demand.buffer_bytes + self._reading_bytes
        peaks[:, 0] += np.where(
            in_prefill[:, 0] | is_alone, prefill_bytes, np.where(in_decode[:, 0], decode_bytes, 0.0)
        )
        peaks[:, 0] += np.where(is_alone, kv_share * self._kv_beside, 0.0)
        if num_devices > 1:
            if self._kv_beside:  # what no unit makes is made where a pass begins
                main = np.take_along_axis(run[0], (run[0] > 0).argmax(axis=1)[:, None], axis=1)
                peaks[:, 1:-1] += np.where(main == np.arange(1, num_devices), kv_share * self._kv_beside, 0.0)
            peaks[:, 0] += np.where(self.has_ring(maps), tables.costs.ring_bytes, 0.0)
        return peaks

    def has_ring(self, maps: Ints) -> Any:
        """[candidates] whether weights go to an accelerator through the ring: for each use, or while they are loaded.

        Also from host memory: it may turn out that it cannot be page-locked.
        """
        return (self._tables.run[:, self._columns, maps] > 0).any(axis=(0, 2))

    def excess(self, maps: Ints, num_slots: Ints) -> Floats:
        """Bytes beyond the limits: [candidates]; 0 for a map that fits."""
        peaks = self.peaks(maps, num_slots)
        over: Floats = np.maximum(peaks - self.limits, 0.0).sum(axis=1)
        if self._unified:
            over = np.maximum(over, self.held_together(peaks) - self.together)
        return over

    def held_together(self, peaks: Floats) -> Floats:
        """Of the memory that the host and unified devices share: [candidates]; 0 where none is shared."""
        total: Floats = peaks[:, 0] + peaks[:, self._unified].sum(axis=1) if self._unified else np.zeros(len(peaks))
        return total


def _in_phase(demand: Demand, phase: str | None) -> tuple[float, int, int, int]:
    """Share of the cache that is there, activations on a host that runs the first pass, or steps alone; on an accelerator."""
    if phase == "load":
        return 0.0, 0, 0, 0
    if phase == "prefill":
        return demand.prompt_share, demand.prefill_activation_bytes, 0, demand.device_activation_bytes
    decode_bytes = demand.decode_activation_bytes
    if phase == "decode":
        return 1.0, decode_bytes, decode_bytes, demand.device_activation_bytes
    return 1.0, demand.activation_bytes, decode_bytes, demand.device_activation_bytes
