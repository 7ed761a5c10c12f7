"""A pass after another on disk, links and processors: when each unit is there, and when it is done. For many maps at once.

What the streamer does, as arithmetic: a unit that does not rest where it runs is fetched into the next slot of its lane as soon
as that slot's last unit is done, in the order in which units are needed; from disk to an accelerator it goes through a ring of
host buffers. Units run one after another, wherever they run. One axis of all arrays is the maps.

Whose end a fetch has to wait for follows from the map alone: the unit that had its slot before, the one that had its buffer
of the ring, the one before it on the link. So that is looked up once, and a pass is a few additions and maxima per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigmodel.device_map.plan import MAX_SLOTS
from bigmodel.device_map.tables import Floats, Ints, Tables

__all__ = ["COMPUTATION", "Outcome", "Step", "simulate"]

Bools = NDArray[np.bool_]

COMPUTATION = "computation on "
# A decode step is what the last two of these take, each; the first is not steady yet.
_NUM_STEPS = 3
_PHASES = ("prefill", "decode")
_NEVER = -(1 << 60)


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
        ttft_s: [maps] of the first pass, all slots empty before.
        step_s: [maps] of a steady decode step.
        busy_s: phase ("prefill", "decode") and resource -> [maps] seconds of a pass in which it works; where that was asked for.
    """

    ttft_s: Floats
    step_s: Floats
    busy_s: dict[tuple[str, str], Floats] = field(default_factory=dict)


def simulate(
    tables: Tables, maps: Ints, num_slots: Ints, *, with_busy: bool = False, record: list[Step] | None = None
) -> Outcome:
    """Run the first pass and a few steps of each map.

    Args:
        tables: what every choice takes.
        maps: [maps, units], the number of each unit's choice.
        num_slots: [maps], of a lane that has so many units.
        with_busy: whether it is said how long each resource works.
        record: filled with what happened in the first map's passes.
    """
    passes = _Passes(tables, maps, num_slots)
    ends = [passes.run(number, record) for number in range(1 + _NUM_STEPS)]
    busy: dict[tuple[str, str], Floats] = {}
    for phase, number in ((0, 0), (1, _NUM_STEPS)) if with_busy else ():
        busy |= {(_PHASES[phase], resource): seconds for resource, seconds in passes.busy(number).items()}
    return Outcome(ttft_s=ends[0], step_s=(ends[-1] - ends[-3]) / 2, busy_s=busy)


@dataclass(frozen=True, slots=True)
class _Fetches:
    """What is fetched in a pass, and what it waits for.

    Attributes:
        reads, copies: [units, maps] from disk, over a link.
        any_read, all_read, any_copy: [units] whether that is so in some map, or in every one.
        slot: [units, maps] place of the time before which nothing is written to a unit's slot (see `_Passes`).
        link: the same for its link.
    """

    reads: Bools
    copies: Bools
    any_read: list[bool]
    all_read: list[bool]
    any_copy: list[bool]
    slot: Ints
    link: Ints | None


class _Passes:
    """Passes of many maps; all arrays are [units, maps].

    The ends of what was done stand in one array: of computations, then of copies, each by pass, unit and map. Its first pass is
    one in which nothing was done, at time zero.
    """

    def __init__(self, tables: Tables, maps: Ints, num_slots: Ints) -> None:
        self._tables = tables
        self._num_maps, self._num_units = maps.shape
        choices = np.ascontiguousarray(maps.T)
        rows = np.arange(self._num_units)[:, None]
        self._run = [tables.run[phase][rows, choices] for phase in (0, 1)]
        self._fetch_to = tables.fetch_to[rows, choices]
        self._compute = [tables.compute[phase][rows, choices] for phase in (0, 1)]
        self._fetched = [tables.is_fetched[phase][rows, choices] for phase in (0, 1)]
        self._read_s = tables.read[rows, choices]
        self._copy_s = tables.copy_seconds(self._fetch_to, tables.copied_bytes[rows, choices])
        self._lanes = self._fetch_to * tables.num_classes + np.array(tables.classes, np.int64).reshape(-1, 1)
        self._num_lanes = len(tables.devices) * tables.num_classes
        flat = self._lanes + np.arange(self._num_maps) * self._num_lanes
        has_slot = self._fetched[0] | self._fetched[1]
        size = self._num_maps * self._num_lanes
        members = np.bincount(flat[has_slot], minlength=size)[flat]
        in_steps = np.bincount(flat[self._fetched[1]], minlength=size)[flat]
        # A lane that holds all its units fetches each of them once: those of all passes, and those of steps.
        self._keeps = [members <= num_slots, in_steps <= num_slots]
        self._back = np.minimum(members, num_slots)
        self._order = [np.flatnonzero(tables.runs[phase]).tolist() for phase in (0, 1)]
        self._hop = [self._hops(phase) for phase in (0, 1)]
        # The host's slots are mapped page by page when they are first read into. Fewer slots are not chosen for that: as many
        # are counted as there may be.
        share = np.where(has_slot & (self._fetch_to == 0), np.minimum(members, MAX_SLOTS) / np.maximum(members, 1), 0.0)
        slot_bytes = np.array([unit.slot_bytes for unit in tables.costs.units], float)
        self._touching_s = slot_bytes @ share / tables.machine.host_rates.fresh_bytes_per_s
        self._size = self._num_units * self._num_maps
        self._copies_at = (2 + _NUM_STEPS) * self._size
        self._ends: Floats = np.zeros(2 * self._copies_at)
        self._known: list[tuple[Bools, Bools, list[Ints | None]]] = []
        self._disk_free: Floats = np.zeros(self._num_maps)
        self._now: Floats = np.zeros(self._num_maps)
        self._is_from_disk, self._is_over_link = self._read_s > 0, self._copy_s > 0

    def run(self, number: int, record: list[Step] | None = None) -> Floats:
        """When a pass is over."""
        phase = min(number, 1)
        fetches, hop, compute = self._fetches(number), self._hop[phase], self._compute[phase]
        computed_at = (1 + number) * self._size
        computed = self._ends[computed_at : computed_at + self._size].reshape(-1, self._num_maps)
        copied_at = self._copies_at + computed_at
        copied = self._ends[copied_at : copied_at + self._size].reshape(-1, self._num_maps)
        ends, now, disk_free = self._ends, self._now, self._disk_free
        for place, u in enumerate(self._order[phase]):
            ready = begin_read = end_read = begin_copy = None
            if fetches.any_read[u]:
                begin_read = np.maximum(disk_free, ends.take(fetches.slot[u]))
                end_read = begin_read + self._read_s[u]
                if fetches.all_read[u]:
                    disk_free = end_read
                else:
                    disk_free = np.where(fetches.reads[u], end_read, disk_free)
                    end_read = end_read * fetches.reads[u]
                ready = end_read
            if fetches.any_copy[u] and fetches.link is not None:
                begin_copy = np.maximum(ends.take(fetches.link[u]), ends.take(fetches.slot[u]))
                if begin_read is not None and end_read is not None:
                    # Through small buffers: a copy begins with the read and ends after it, and a read waits for its copy.
                    begin_copy = np.maximum(begin_copy, begin_read * fetches.reads[u])
                    end_copy = np.maximum(begin_copy + self._copy_s[u], end_read) * fetches.copies[u]
                    disk_free = np.where(fetches.reads[u], np.maximum(disk_free, end_copy), disk_free)
                else:
                    end_copy = (begin_copy + self._copy_s[u]) * fetches.copies[u]
                copied[u] = end_copy
                ready = end_copy if ready is None else np.maximum(ready, end_copy)
            begin = now + hop[place] if hop is not None else now
            if ready is not None:
                begin = np.maximum(begin, ready)
            now = begin + compute[u]
            computed[u] = now
            if record is not None:
                is_read, is_copied = bool(fetches.reads[u, 0]), bool(fetches.copies[u, 0])
                record.append(
                    Step(
                        u,
                        number,
                        self._tables.devices[int(self._run[phase][u, 0])],
                        _span(begin_read, end_read) if is_read else None,
                        _span(begin_copy, copied[u]) if is_copied else None,
                        (float(begin[0]), float(now[0])),
                    )
                )
        self._now = now + self._glue(phase)
        if number == 0:
            self._now = self._now + self._touching_s
        self._disk_free = disk_free
        return self._now

    def busy(self, number: int) -> dict[str, Floats]:
        """Seconds of a pass in which each resource works."""
        phase, fetches = min(number, 1), self._fetches(number)
        runs = self._tables.runs[phase][:, None]
        found = {"disk": (self._read_s * fetches.reads).sum(axis=0)}
        run = self._run[phase]
        last = run[self._order[phase][-1]] if self._order[phase] else np.zeros(self._num_maps, np.int64)
        for d, name in enumerate(self._tables.devices):
            found[f"link to {name}"] = (self._copy_s * (fetches.copies & (self._fetch_to == d))).sum(axis=0)
            computing: Floats = (self._compute[phase] * (runs & (run == d))).sum(axis=0)
            found[f"{COMPUTATION}{name}"] = computing + np.where(last == d, self._glue(phase), 0.0)
        return found

    def _glue(self, phase: int) -> Floats:
        """What is done outside all units, on the device where the last of them ran."""
        order = self._order[phase]
        last: Any = self._run[phase][order[-1]] if order else np.zeros(self._num_maps, np.int64)
        seconds: Floats = self._tables.glue[phase][last] if self._num_units else np.zeros(self._num_maps)
        return seconds

    def _hops(self, phase: int) -> Floats | None:
        """[units that run, maps] what the hidden state takes to get to each."""
        order = self._order[phase]
        if len(self._tables.devices) == 1 or not order:
            return None
        run = self._run[phase][order]
        hops: Floats = np.zeros(run.shape)
        hops[1:] = self._tables.hop[phase][run[:-1], run[1:]]
        return hops

    def _fetches(self, number: int) -> _Fetches:
        wanted = self._wanted(number)
        reads, copies = wanted & self._is_from_disk, wanted & self._is_over_link
        slot, link = (
            None if each is None else np.maximum(each + (1 + number) * self._size, 0) for each in self._waits(number)
        )
        assert slot is not None
        return _Fetches(
            reads,
            copies,
            _each(reads.any(axis=1)),
            _each(reads.all(axis=1)),
            _each(copies.any(axis=1)),
            slot,
            link,
        )

    def _wanted(self, number: int) -> Bools:
        """What is fetched in a pass."""
        runs = self._tables.runs
        phase = min(number, 1)
        wanted: Bools = self._fetched[phase] & runs[phase][:, None]
        if number:  # what was fetched before is still in its slot, where it is kept
            was_fetched = self._fetched[0] & runs[0][:, None]
            if number > 1:
                was_fetched = was_fetched | (self._fetched[1] & runs[1][:, None])
            wanted = wanted & ~(self._keeps[number > 1] & was_fetched)
        return wanted

    def _waits(self, number: int) -> list[Ints | None]:
        """Places of the ends that a unit's slot and link wait for, relative to the pass."""
        wanted = self._wanted(number)
        earlier = self._wanted(number - 1) if number else wanted
        for known, known_earlier, places in self._known:
            if (known == wanted).all() and (known_earlier == earlier).all():
                return places
        copies, copied = wanted & self._is_over_link, earlier & self._is_over_link
        slot = self._before(self._lanes, self._num_lanes, wanted, earlier, self._back)
        link = None
        if copies.any():
            link = self._copies_at + self._before(self._fetch_to, len(self._tables.devices), copies, copied, 1)
        self._known.append((wanted, earlier, [slot, link]))
        return [slot, link]

    def _before(self, group: Ints, num_groups: int, is_member: Bools, was_member: Bools, back: Any) -> Ints:
        """Where the end of the member of its group stands that came so many places before a unit, in this pass or an earlier."""
        flat = group + np.arange(self._num_maps) * num_groups
        rank, counts, member = self._ranks(flat, is_member, num_groups)
        index = rank - back
        turns, at = np.divmod(index, np.maximum(counts[flat], 1))
        unit = member[flat, at]
        if was_member is not is_member and not (was_member == is_member).all():
            _, counts_before, member_before = self._ranks(flat, was_member, num_groups)
            at_before = index + counts_before[flat]
            is_earlier = index < 0
            unit = np.where(is_earlier, member_before[flat, np.where(is_earlier, np.maximum(at_before, 0), 0)], unit)
            turns = np.where(is_earlier, np.where(at_before < 0, _NEVER // self._size, -1), turns)
        place = turns * self._size + unit * self._num_maps + np.arange(self._num_maps)
        found: Ints = np.where(is_member, place, _NEVER)
        return found

    def _ranks(self, flat: Ints, is_member: Bools, num_groups: int) -> tuple[Ints, Ints, Ints]:
        """Each unit's number in its group, members of each group, and [groups of all maps, numbers] which units they are."""
        counts = np.zeros(self._num_maps * num_groups, np.int64)
        rank = np.empty_like(flat)
        for u in range(self._num_units):
            rank[u] = counts.take(flat[u])
            counts[flat[u]] = rank[u] + is_member[u]
        # As wide as the largest group, and one more: a unit that is no member may ask for what is not there.
        member = np.zeros((len(counts), int(counts.max(initial=0)) + 1), np.int64)
        units = np.broadcast_to(np.arange(self._num_units)[:, None], flat.shape)
        member[flat[is_member], rank[is_member]] = units[is_member]
        return rank, counts, member


def _each(units: Any) -> list[bool]:
    return [bool(unit) for unit in units]


def _span(begin: Sequence[float] | Floats | None, end: Sequence[float] | Floats | None) -> tuple[float, float]:
    assert begin is not None
    assert end is not None
    return float(begin[0]), float(end[0])
