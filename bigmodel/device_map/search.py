"""The map that takes the least time, among those that fit: all of them where they are few, else a search from good beginnings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.device_map.beginnings import Beginnings, single_changes
from bigmodel.device_map.memory import Memory
from bigmodel.device_map.plan import MAX_SLOTS
from bigmodel.device_map.simulation import simulate
from bigmodel.device_map.tables import Floats, Ints, Tables
from bigmodel.progress import PLANNING, Report

__all__ = ["Found", "Search"]

# So many maps are all looked at. Beyond, as many unit-passes as this are simulated (1e6 take about 0.4 s).
_ALL_BELOW = 320_000
_MOST_UNIT_PASSES = 8_000_000
_CHUNK_ELEMENTS = 100_000
_FROM_BEST = 4
_SWAPS = 1_024
_MOST_FAILURES = 3
# The best that descents end in are shaken: a few units drawn anew, for so much work each. In vain so often in a row, once for
# every three units at most: the maps near a small one have been looked at.
_SHAKEN, _MOST_DRAWN, _MOST_SHAKES = 2, 8, 12
_SHAKING_UNIT_PASSES = 1_000_000


@dataclass(frozen=True, slots=True)
class Found:
    """A map, and what it takes.

    Attributes:
        choices: number of each unit's choice.
        num_slots: of each lane.
        seconds: of the workload: its first pass, and a step for each token after the first.
        what: how the search began that led to it.
    """

    choices: tuple[int, ...]
    num_slots: int
    seconds: float
    what: str


class Search:
    """Looks for the map of the least time.

    Args:
        tables: costs, machine and choices.
        limits: tier -> bytes.
        max_slots: of a lane.
        progress: called with (phase, steps done, steps at most).

    Attributes:
        memory: what maps hold.
    """

    def __init__(
        self,
        tables: Tables,
        limits: Mapping[str, int],
        *,
        max_slots: int = MAX_SLOTS,
        progress: Report | None = None,
    ) -> None:
        self._tables = tables
        self._units = tables.costs.units
        self._columns = np.arange(len(self._units))
        self._max_slots = max_slots
        self._limits = limits
        self.memory = Memory(tables, limits)
        self._beginnings = Beginnings(tables, self.memory, max_slots)
        self._slot_bytes = np.array([unit.slot_bytes for unit in self._units], float)
        # Maps that are looked at together: as many as keep an array of units small.
        self._chunk = max(64, _CHUNK_ELEMENTS // max(1, len(self._units)))
        self._spent, self._most = 0, _MOST_UNIT_PASSES
        self._progress = progress

    def least(self) -> Found:
        """The map that lacks the least memory, whether it fits or not."""
        least = self._beginnings.least()
        seconds = float(self.seconds(least[None], np.array([1]))[0])
        return Found(tuple(int(c) for c in least), 1, seconds, "the least memory")

    def seconds(self, maps: Ints, num_slots: Ints) -> Floats:
        """Of the workload, whether the map fits or not: [candidates]."""
        outcome = simulate(self._tables, maps, num_slots)
        self._spent += maps.size * 4
        total: Floats = outcome.ttft_s + self._tables.costs.workload.num_steps * outcome.step_s
        return total

    def fetched_bytes(self, maps: Ints) -> Floats:
        """That a decode step fetches: [candidates]."""
        fetched: Floats = np.where(self._tables.is_fetched[1][self._columns, maps], self._slot_bytes, 0.0)
        total: Floats = fetched.sum(axis=1)
        return total

    def unevenness(self, maps: Ints) -> Floats:
        """The squares of the distances from one unit that is fetched to the next, summed: [candidates]."""
        fetched = self._tables.is_fetched[1][self._columns, maps]
        total: Floats = np.zeros(len(maps))
        distance: Floats = np.full(len(maps), np.nan)  # nothing counts before the first one
        for u in [*range(maps.shape[1]), *range(maps.shape[1])]:  # twice around, so that the first one counts too
            distance = distance + 1.0
            total += np.where(fetched[:, u] & (distance == distance), np.nan_to_num(distance) ** 2, 0.0)
            distance[fetched[:, u]] = 0.0
        return total

    def go_on(self, current: Sequence[int], num_slots: int) -> Found:
        """Where a map that fits leads to, with a tenth of a whole search's work."""
        self._most = _MOST_UNIT_PASSES // 10
        own = np.array(current, np.int64)
        counts = range(1, self._max_slots + 1)
        maps = np.array([own, *(self._beginnings.refilled(own, count) for count in counts)], np.int64)
        slots = np.array([num_slots, *counts])
        found = [
            Found(tuple(int(c) for c in maps[number]), int(slots[number]), seconds, "from another map")
            for number, seconds in self._fitting(maps, slots)
        ]
        return self._improve(self._sorted(found)[0])

    def run(self) -> list[Found]:
        """Maps that fit, the best first, each the best that was found from its beginning; none where nothing fits."""
        num_maps = math.prod(map(len, self._tables.choices)) * self._max_slots
        if num_maps <= _ALL_BELOW:
            return self._all()
        found: dict[tuple[tuple[int, ...], int], Found] = {}
        seeds = [*self._beginnings.named(self._limits), *self._beginnings.every()]
        seeds.append(("the least memory", self._beginnings.least()))
        maps = np.array([choices for _, choices in seeds for _ in range(self._max_slots)], np.int64)
        slots = np.tile(np.arange(1, self._max_slots + 1), len(seeds))
        names = [what for what, _ in seeds for _ in range(self._max_slots)]
        for number, seconds in self._fitting(maps, slots):
            key = tuple(int(c) for c in maps[number]), int(slots[number])
            if key not in found:
                found[key] = Found(*key, seconds, names[number])
        ranked = self._sorted(list(found.values()))
        best_of: dict[tuple[str, int], Found] = {}
        for each in ranked:
            best_of.setdefault((each.what, each.num_slots), each)
        improved = [self._improve(each) for each in list(best_of.values())[:_FROM_BEST]]
        improved += [self._shaken(each) for each in self._sorted(improved)[:_SHAKEN]]
        every = {(each.choices, each.num_slots): each for each in [*improved, *best_of.values()]}
        return self._sorted(list(every.values()))

    def _ranked(self, maps: Ints, num_slots: Ints, seconds: Floats) -> Ints:
        """Numbers of maps by time; of those that take the same, what fetches less, then more evenly, then has more slots."""
        if not len(maps):
            return np.zeros(0, np.int64)
        least = max(float(seconds.min()), 1e-30)
        same = np.round(seconds / least * 1e11)
        first = np.flatnonzero(same == same.min())  # only there is more to tell
        tied = maps[first]
        devices = (
            self._tables.run[:, self._columns, tied].sum(axis=0).sum(axis=1)
        )  # the first device of those that are alike
        order = np.lexsort((devices, -num_slots[first], self.unevenness(tied), self.fetched_bytes(tied)))
        ranked = [*first[order], *(number for number in np.argsort(same, kind="stable") if same[number] > same.min())]
        return np.array(ranked, np.int64)

    def _sorted(self, found: Sequence[Found]) -> list[Found]:
        if not found:
            return []
        maps = np.array([each.choices for each in found], np.int64).reshape(len(found), -1)
        slots = np.array([each.num_slots for each in found])
        return [found[number] for number in self._ranked(maps, slots, np.array([each.seconds for each in found]))]

    def _all(self) -> list[Found]:
        """Every map, the best of each number of slots."""
        best: list[Found] = []
        counts = [range(len(each)) for each in self._tables.choices]
        pending = itertools.product(*counts)
        while chunk := list(itertools.islice(pending, self._chunk)):
            maps = np.array(chunk, np.int64).reshape(len(chunk), len(counts))
            for slots in range(1, self._max_slots + 1):
                results = list(self._fitting(maps, np.full(len(maps), slots)))
                if results:
                    numbers, seconds = np.array([n for n, _ in results]), np.array([s for _, s in results])
                    at = self._ranked(maps[numbers], np.full(len(numbers), slots), seconds)[0]
                    choices = tuple(int(c) for c in maps[numbers[at]])
                    best.append(Found(choices, slots, float(seconds[at]), "all maps"))
        return self._sorted(best)

    def _fitting(self, maps: Ints, slots: Ints) -> Iterator[tuple[int, float]]:
        """(number, seconds) of the maps that fit."""
        for start in range(0, len(maps), self._chunk):
            part, part_slots = maps[start : start + self._chunk], slots[start : start + self._chunk]
            fits = np.flatnonzero(self.memory.excess(part, part_slots) <= 0)
            if len(fits):
                times = self.seconds(part[fits], part_slots[fits])
                yield from ((start + int(number), float(seconds)) for number, seconds in zip(fits, times, strict=True))

    def _improve(self, found: Found) -> Found:
        """Where single changes and exchanges lead, many at a time where they help together, as long as the budget lasts."""
        random = np.random.default_rng(0)
        failures = 0
        while self._spent < self._most and failures < _MOST_FAILURES:
            if self._progress is not None:
                self._progress(PLANNING, self._spent, self._most)
            current = np.array(found.choices, np.int64)
            maps, are_all = self._exchanges(current, random)
            better = found
            if not failures:  # what did not help does not help the second time
                maps = np.concatenate([single_changes(self._tables, current), maps])
                others = np.array([n for n in range(1, self._max_slots + 1) if n != found.num_slots], np.int64)
                better, _ = self._best_of(found, np.tile(current, (len(others), 1)), others)
            better, times = self._best_of(better, maps, np.full(len(maps), found.num_slots))
            together = self._together(current, maps, times, found.seconds)
            better, _ = self._best_of(better, together, np.full(len(together), found.num_slots))
            if better is found and are_all:
                break
            failures = failures + 1 if better is found else 0
            found = better
        return found

    def _shaken(self, found: Found) -> Found:
        """Where descents lead from maps near this one: a few units drawn anew, what then does not fit made to fit."""
        random = np.random.default_rng(0)
        failures, most = 0, min(self._most, self._spent + _SHAKING_UNIT_PASSES)
        most_failures = min(_MOST_SHAKES, len(found.choices) // 3)
        while self._spent < most and failures < most_failures:
            failures += 1
            current = np.array(found.choices, np.int64)
            count = int(random.integers(2, _MOST_DRAWN, endpoint=True))
            for u in random.choice(len(current), min(len(current), count), replace=False):
                current[u] = random.integers(len(self._tables.choices[u]))
            current = self._beginnings.fitted(current, found.num_slots)
            for _, seconds in self._fitting(current[None], np.array([found.num_slots])):
                other = self._improve(replace(found, choices=tuple(int(c) for c in current), seconds=seconds))
                if other.seconds < found.seconds * (1 - 1e-9):
                    found, failures = other, 0
        return found

    def _best_of(self, found: Found, maps: Ints, slots: Ints) -> tuple[Found, dict[int, float]]:
        """The best of these maps, or the one that was found, where none is better in anything; number -> seconds of each."""
        # The one that was found is first: of two that are alike in everything, it stays.
        maps = np.concatenate([np.array([found.choices], np.int64).reshape(1, -1), maps])
        slots = np.concatenate([[found.num_slots], slots])
        results = list(self._fitting(maps, slots))
        numbers, seconds = np.array([n for n, _ in results]), np.array([s for _, s in results])
        times = {number - 1: seconds for number, seconds in results if number}
        at = int(self._ranked(maps[numbers], slots[numbers], seconds)[0])
        if numbers[at] == 0:
            return found, times
        choices = tuple(int(c) for c in maps[numbers[at]])
        return Found(choices, int(slots[numbers[at]]), float(seconds[at]), found.what), times

    def _together(self, current: Ints, maps: Ints, times: Mapping[int, float], before: float) -> Ints:
        """The changes that help, the best first, more and more of them at once, each unit changed once."""
        helping = sorted((seconds, number) for number, seconds in times.items() if seconds < before)
        changed = np.zeros(len(current), bool)
        combined, found, count = current.copy(), [], 0
        for _, number in helping:
            differs = maps[number] != current
            if (differs & changed).any():
                continue
            combined[differs] = maps[number][differs]
            changed |= differs
            count += 1
            if count > 1 and (count < 8 or count % 4 == 0):
                found.append(combined.copy())
        return np.array(found, np.int64).reshape(-1, len(current))

    def _exchanges(self, current: Ints, random: np.random.Generator) -> tuple[Ints, bool]:
        """Two units take each other's choice; neighbours always, others at random of very many. Also whether these are all."""
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(len(current)), 2)
            if self._tables.choice_in(current, i) != self._tables.choice_in(current, j)
        ]
        are_all = len(pairs) <= _SWAPS
        if not are_all:
            near = [pair for pair in pairs if pair[1] - pair[0] <= 2]
            chosen = random.choice(len(pairs), _SWAPS, replace=False)
            pairs = [*near, *(pairs[number] for number in chosen)]
        exchanged = []
        for i, j in pairs:
            first, second = (
                self._tables.numbers[i].get(self._tables.choice_in(current, j)),
                self._tables.numbers[j].get(self._tables.choice_in(current, i)),
            )
            if first is not None and second is not None:
                other = current.copy()
                other[i], other[j] = first, second
                exchanged.append(other)
        return np.array(exchanged, np.int64).reshape(-1, len(current)), are_all
