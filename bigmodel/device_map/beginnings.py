"""Maps to begin a search from: good by what is known, found without simulating anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bigmodel.device_map.memory import Memory
from bigmodel.device_map.named import NAMED, homes_of
from bigmodel.device_map.tables import DISK, Choice, Floats, Ints, Tables

__all__ = ["Beginnings", "single_changes"]


class Beginnings:
    """Gives maps; a search goes on from them.

    Args:
        tables: costs, machine and choices.
        memory: what maps hold.
        max_slots: of a lane.
    """

    def __init__(self, tables: Tables, memory: Memory, max_slots: int) -> None:
        self._tables = tables
        self._memory = memory
        self._max_slots = max_slots
        self._units = tables.costs.units
        self._columns = np.arange(len(self._units))
        self._slot_bytes = np.array([unit.slot_bytes for unit in self._units], float)

    def every(self) -> Iterator[tuple[str, Ints]]:
        """Maps that are good by what is known: few devices, what streams spread evenly, links that take turns."""
        devices = self._tables.devices
        used = {choice.run_on for choices in self._tables.choices for choice in choices}
        accelerators = [each for each in self._tables.machine.accelerators if each.device in used]
        speeds = {each.device: each.rates.memory_bytes_per_s for each in accelerators}
        by_speed = sorted(speeds, key=lambda device: (-speeds[device], devices.index(device)))
        by_room = sorted(
            speeds, key=lambda device: (-self._memory.limits[devices.index(device)], devices.index(device))
        )
        groups = dict.fromkeys(
            tuple(order[:count]) for order in (by_speed, by_room) for count in range(1, len(order) + 1)
        )
        alike = {
            self._tables.machine.kind_of(device, limit): device for device, limit in reversed(self._rooms(by_speed))
        }
        groups |= dict.fromkeys((device,) for device in by_speed if device in alike.values())
        hosted = {Choice.at("cpu", "cpu"), Choice.at(DISK, "cpu")}
        on_host = all(not hosted.isdisjoint(numbers) for numbers in self._tables.numbers)
        for group in [*([("cpu",)] if on_host else []), *groups]:
            named = group[0] if len(group) == 1 else f"{len(group)} accelerators"
            ways = {"": [group[0]] * len(self._units)}
            if len(group) > 1:
                ordered = sorted(group, key=devices.index)
                parts = np.searchsorted(self._shares(ordered), self._columns, "right")
                ways = {
                    ", one part each": [ordered[int(part)] for part in parts],
                    ", in turn": [ordered[u % len(ordered)] for u in range(len(self._units))],
                }
            for way, device_of in ways.items():
                for slots in range(1, self._max_slots + 1):
                    for small_first in (True, False):
                        begun = self._filled(device_of, slots, small_first=small_first)
                        if begun is None:
                            continue
                        yield f"{named}{way}", begun
                        for told, begun_there in self._run_on_host(begun):
                            yield f"{named}{way}, what rests in host memory on the cpu{told}", begun_there

    def refilled(self, current: Ints, num_slots: int) -> Ints:
        """A map that fits, with more of each kind where it runs, or in host memory, as far as that fits too."""
        device_of = [self._tables.choice_in(current, u).prefill_on for u in range(len(current))]
        for home in ("its device", "cpu"):
            current = self._upgraded(current, device_of, home, num_slots, small_first=True)
        return current

    def _rooms(self, devices: Sequence[str]) -> list[tuple[str, float]]:
        """Devices with their limits."""
        return [(device, float(self._memory.limits[self._tables.devices.index(device)])) for device in devices]

    def _shares(self, group: Sequence[str]) -> Floats:
        """Positions at which the next device's part begins, by their limits."""
        rooms = np.array([room for _, room in self._rooms(group)])
        sizes = np.cumsum(self._slot_bytes)
        wanted = np.cumsum(rooms) / max(rooms.sum(), 1.0) * (sizes[-1] if len(sizes) else 0.0)
        bounds: Floats = np.searchsorted(sizes, wanted[:-1], "left").astype(float)
        return bounds

    def _filled(self, device_of: Sequence[str], num_slots: int, *, small_first: bool) -> Ints | None:
        """Everything away, then as much of each kind as fits into device memory, then into host memory."""
        current = self._away(device_of)
        slots = np.array([num_slots])
        if self._memory.excess(current[None], slots)[0] > 0:
            return None
        for home in ("its device", "cpu"):
            current = self._upgraded(current, device_of, home, num_slots, small_first=small_first)
        return current

    def _away(self, device_of: Sequence[str]) -> Ints:
        """Every unit as far from its device as it may be."""
        current = np.zeros(len(self._units), np.int64)
        for u in range(len(self._units)):
            device = device_of[u]
            hosted = [Choice.at(DISK, "cpu"), Choice.at("cpu", "cpu")]
            ways = [*(Choice.at(home, device) for home in (DISK, "cpu", device)), *hosted]
            if self._units[u].can_gather:
                ways = [*hosted, *ways]
            current[u] = next((self._tables.numbers[u][way] for way in ways if way in self._tables.numbers[u]), 0)
        return current

    def fitted(self, current: Ints, num_slots: int) -> Ints:
        """Single changes that lower what does not fit, while there are any."""
        slots = np.array([num_slots])
        over = float(self._memory.excess(current[None], slots)[0])
        for _ in range(2 * len(current)):
            maps = single_changes(self._tables, current)
            if not len(maps):
                return current
            excess = self._memory.excess(maps, np.full(len(maps), num_slots))
            if excess.min() >= over:
                return current
            over, current = float(excess.min()), maps[int(excess.argmin())]
            if over <= 0:
                return current
        return current

    def _upgraded(
        self, current: Ints, device_of: Sequence[str], home: str, num_slots: int, *, small_first: bool
    ) -> Ints:
        """As many units of each kind as fit get that home, those that do not spread evenly among their like."""
        kinds: dict[tuple[int, str], list[int]] = {}
        for u, unit in enumerate(self._units):
            device = device_of[u]
            wanted = Choice.at(device if home == "its device" else home, device)
            now = self._tables.choice_in(current, u)
            is_better = wanted in self._tables.numbers[u] and now.home in (DISK, "cpu")
            if is_better and now != wanted and not home == now.home == "cpu":
                kinds.setdefault((-unit.slot_bytes if not small_first else unit.slot_bytes, device), []).append(u)
        for (_, device), members in sorted(kinds.items()):
            wanted = Choice.at(device if home == "its device" else home, device)
            low, high = 0, len(members) + 1  # as many as fit; all of them first, which need no slots
            best = current
            count = len(members)
            while high - low > 1:
                changed = current.copy()
                for position in _spread(len(members), count):
                    changed[members[position]] = self._tables.numbers[members[position]][wanted]
                if self._memory.excess(changed[None], np.array([num_slots]))[0] <= 0:
                    low, best = count, changed
                else:
                    high = count
                count = (low + high) // 2
            current = best
        return current

    def _run_on_host(self, current: Ints) -> Iterator[tuple[str, Ints]]:
        """The same homes, but what rests in host memory runs there too, in steps or in all passes, where that is open."""
        for told in (" in steps", ""):
            changed = current.copy()
            for u, numbers in enumerate(self._tables.numbers):
                now = self._tables.choice_in(current, u)
                there = now._replace(run_on="cpu") if told else Choice.at("cpu", "cpu")
                if now.home == "cpu" and there in numbers:
                    changed[u] = numbers[there]
            if (changed != current).any():
                yield told, changed

    def named(self, limits: Mapping[str, int]) -> Iterator[tuple[str, Ints]]:
        """The maps that have names; what streams in them takes turns on the accelerators."""
        tables = self._tables
        accelerators = [device for device in tables.devices[1:] if limits.get(device, 0) > 0]
        for name in NAMED if accelerators else ():
            homes = homes_of(name, tables.costs, tables.machine, limits, num_slots=self._max_slots)
            current = np.zeros(len(self._units), np.int64)
            for u, unit in enumerate(self._units):
                home, device = homes[unit.unit.name], accelerators[u % len(accelerators)]
                wanted = [Choice.at(home, where) for where in (home, device, *accelerators)]
                current[u] = next((tables.numbers[u][way] for way in wanted if way in tables.numbers[u]), 0)
            yield name, current

    def least(self) -> Ints:
        """The map that lacks the least memory with one slot for each lane, whether it fits or not."""
        devices = self._tables.devices
        best: tuple[float, Ints] | None = None
        for device in devices[1:] or ["cpu"]:
            current = self.fitted(self._away([device] * len(self._units)), 1)
            over = float(self._memory.excess(current[None], np.array([1]))[0])
            if best is None or over < best[0]:
                best = over, current
        assert best is not None
        return best[1]


def single_changes(tables: Tables, current: Ints) -> Ints:
    """Every map that differs in one unit."""
    changed = []
    for u, choices in enumerate(tables.choices):
        for c in range(len(choices)):
            if c != current[u]:
                other = current.copy()
                other[u] = c
                changed.append(other)
    return np.array(changed, np.int64).reshape(-1, len(current))


def _spread(num_units: int, num_staying: int) -> list[int]:
    """`num_staying` positions, such that the others are spread evenly among them."""
    num_away = num_units - num_staying
    away = {(2 * i + 1) * num_units // (2 * num_away) for i in range(num_away)} if num_away else set()
    return [number for number in range(num_units) if number not in away]
