"""Three verbs move units through slots: prefetch (issue), enter (wait, bind, prefetch ahead), leave (release)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch.profiler import record_function

from bigmodel.errors import StreamingError
from bigmodel.hooks.hops import Phase
from bigmodel.hooks.pace import Reading
from bigmodel.hooks.schedule import Schedule
from bigmodel.hooks.slots import Binding, Slot, SlotState, views_of
from bigmodel.hooks.stats import StreamStats
from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory
from bigmodel.offload.meter import Flow
from bigmodel.offload.store import Store

__all__ = ["StreamedUnit", "Streamer"]

logger = logging.getLogger("bigmodel.hooks")


@dataclass(eq=False, slots=True)
class StreamedUnit:
    """A unit that is fetched for each use.

    Attributes:
        name: for errors and logs.
        bindings: its parameters.
        places: parameter name -> first byte in a slot.
        lane: number of the lane whose slots it takes turns in.
        phases: in which it is fetched; in others it runs where it rests.
    """

    name: str
    bindings: Sequence[Binding]
    places: Mapping[str, int]
    lane: int
    phases: Collection[Phase] = tuple(Phase)
    slot: Slot | None = None
    depth: int = 0
    is_bound: bool = False


class Streamer:
    """Keeps the slots filled ahead of the computation. Used by one thread at a time; the reader threads only set tickets.

    Args:
        units: in order of definition; their numbers are their positions.
        lanes: per lane, the memory of each of its slots.
        store: fills slots.
        flow: tells what was read and copied.

    Attributes:
        store: the same; another may take its place between passes.
    """

    def __init__(
        self,
        units: Sequence[StreamedUnit],
        lanes: Sequence[Sequence[Arena | DeviceMemory]],
        store: Store,
        flow: Callable[[], Flow] = Flow,
    ) -> None:
        self._units = units
        self._lanes = [[Slot(memory) for memory in lane] for lane in lanes]
        self.store = store
        self._flow = flow
        self._schedule = Schedule(range(len(units)))
        self._schedules = dict.fromkeys(Phase, self._schedule)
        if any(Phase.STEP not in unit.phases for unit in units):  # then steps have an order of their own
            self._schedules[Phase.STEP] = Schedule([n for n, unit in enumerate(units) if Phase.STEP in unit.phases])
        self._is_closed = False
        self.stall_s = 0.0
        self.num_reads = self.read_bytes = self.copied_bytes = self.num_hits = self.num_misses = 0
        self.slot_bytes = sum(slot.memory.nbytes for lane in self._lanes for slot in lane)
        for number, unit in enumerate(units):
            for slot in self._lanes[unit.lane]:
                slot.views[number] = views_of(unit.bindings, unit.places, slot.memory)

    def turn_to(self, phase: Phase) -> None:
        """Expect the units of a pass of that phase from now on."""
        if self._schedules[phase] is not self._schedule:
            self._schedule = self._schedules[phase]
            self.prefetch()

    def is_fetched(self, number: int, phase: Phase) -> bool:
        """Whether a unit is fetched in passes of a phase."""
        return phase in self._units[number].phases

    def enter(self, number: int) -> None:
        """Make a unit's weights be there: wait for them, bind them, and issue what comes next.

        Raises:
            ReadError: with the unit's name, when its weights could not be read. The unit is left at rest.
        """
        if self._is_closed:
            return
        unit = self._units[number]
        unit.depth += 1
        if unit.depth > 1:
            return
        try:
            self._enter(number, unit)
        except BaseException:
            unit.depth = 0
            raise

    def _enter(self, number: int, unit: StreamedUnit) -> None:
        self._schedule.entered(number)
        is_hit = unit.slot is not None
        if is_hit:
            self.num_hits += 1
        else:
            self.num_misses += 1
            self._claim_for_now(number)
        logger.debug("%s entered, %s", unit.name, "fetched ahead" if is_hit else "not fetched ahead")
        slot = unit.slot
        if slot is None:
            # Every slot is held by a unit that encloses this one: it runs on its weights where they rest, slower.
            logger.debug("%s found no free slot and runs on its weights at rest", unit.name)
            return
        if slot.state is SlotState.READY:
            slot.state = SlotState.IN_USE  # before prefetch looks for slots to take
        self.prefetch()
        if slot.ticket is not None:
            self._wait(unit, slot)
        slot.wait_until_filled()
        slot.state = SlotState.IN_USE
        self._check_unchanged(unit, slot)
        unit.is_bound = True
        for binding, view in zip(unit.bindings, slot.views[number], strict=True):
            binding.bind(view)

    def leave(self, number: int) -> None:
        """Put a unit back to rest and give its slot to what comes next. Does nothing for a unit that was not entered."""
        unit = self._units[number]
        if unit.depth == 0:
            return
        unit.depth -= 1
        if unit.depth == 0:
            self._release(unit)
            self.prefetch()

    def is_entered(self, number: int) -> bool:
        """Whether a unit was entered and not yet left."""
        return self._units[number].depth > 0

    def prefetch(self) -> None:
        """Issue reads for the units that come next, into slots whose weights are needed later than theirs."""
        if self._is_closed:
            return
        self._settle()
        takeable = (SlotState.EMPTY, SlotState.READY)
        open_lanes = {n for n, lane in enumerate(self._lanes) if any(slot.state in takeable for slot in lane)}
        if not open_lanes:
            return
        distance = self._distances()
        for number, ahead in distance.items():
            unit = self._units[number]
            if unit.slot is not None or unit.lane not in open_lanes or unit.depth:
                continue
            slot = self._free_slot(unit.lane, distance, later_than=ahead)
            if slot is None:
                open_lanes.discard(unit.lane)
                if not open_lanes:
                    return
                continue
            self._fill(number, slot, is_urgent=False)

    def reset(self) -> None:
        """Put every unit back to rest, after a pass that was interrupted where no hook could see it."""
        for unit in self._units:
            unit.depth = 0
            self._release(unit)
        for lane in self._lanes:
            for slot in lane:
                if slot.state is SlotState.FILLING and slot.unit is None:
                    self._recover(slot)

    def close(self) -> None:
        """Stop reading and put every unit to rest. The slots' memory goes with this object."""
        self._is_closed = True
        self.reset()
        self.store.close()
        for memory in (slot.memory for lane in self._lanes for slot in lane):
            if isinstance(memory, DeviceMemory):
                memory.link.drain()
                if memory.after is not None:  # the work of a stream that the allocator does not know of
                    memory.link.wait(memory.after)
        for lane in self._lanes:
            for slot in lane:
                slot.views.clear()
        for unit in self._units:
            unit.slot = None
        self._lanes = []

    def counts(self) -> StreamStats:
        """The streamer's part of the statistics."""
        return StreamStats(
            stall_s=self.stall_s,
            num_reads=self.num_reads,
            read_bytes=self.read_bytes,
            copied_bytes=self.copied_bytes,
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            slot_bytes=self.slot_bytes,
        )

    def reading(self) -> Reading:
        """The counters that passes are judged by, as they are now."""
        return Reading(self.stall_s, self.num_hits, self.num_misses, self._flow())

    def _wait(self, unit: StreamedUnit, slot: Slot) -> None:
        ticket = slot.ticket
        assert ticket is not None
        try:
            if not ticket.done.is_set():
                started = time.perf_counter()
                with record_function(f"bigmodel::wait {unit.name}"):
                    ticket.done.wait()
                self.stall_s += time.perf_counter() - started
            ticket.wait()
        except BaseException:
            # Also on Ctrl-C while waiting: then the slot goes on filling, for the next pass.
            if ticket.error is not None:
                self._empty(slot)
            raise
        slot.filled, slot.ticket = ticket.filled, None

    def _settle(self) -> None:
        """Note which fillings have ended: a unit that was expected and did not come must not keep its slot."""
        for lane in self._lanes:
            for slot in lane:
                ticket = slot.ticket
                if slot.state is not SlotState.FILLING or ticket is None or not ticket.done.is_set():
                    continue
                if slot.unit is not None and self._units[slot.unit].depth:
                    continue  # somebody is about to wait for it
                if ticket.error is not None:
                    self._empty(slot)  # it is read again when it is needed, and says then what is wrong
                elif slot.unit is not None:
                    slot.state, slot.filled, slot.ticket = SlotState.READY, ticket.filled, None

    def _check_unchanged(self, unit: StreamedUnit, slot: Slot) -> None:
        changed = [binding.name for binding in unit.bindings if not binding.is_unchanged()]
        if changed:
            slot.state = SlotState.READY
            raise StreamingError(
                f"{', '.join(changed)} changed while resting on disk, and streaming would lose the change. "
                "Call bigmodel.materialize(model) before changing weights, or load the changed checkpoint."
            )

    def _claim_for_now(self, number: int) -> None:
        self._settle()
        lane = self._units[number].lane
        distance = self._distances()
        slot = self._free_slot(lane, distance, later_than=-1)
        if slot is None:
            filling = [slot for slot in self._lanes[lane] if slot.state is SlotState.FILLING and slot.ticket]
            if not filling:
                return
            slot = max(
                filling, key=lambda slot: distance.get(-1 if slot.unit is None else slot.unit, len(distance) + 1)
            )
            self._cancel(slot)
        self._fill(number, slot, is_urgent=True)

    def _distances(self) -> dict[int, int]:
        """Unit number -> entries until its next predicted use, the soonest first."""
        return {number: ahead for ahead, number in enumerate(dict.fromkeys(self._schedule.upcoming(len(self._units))))}

    def _free_slot(self, lane: int, distance: dict[int, int], *, later_than: int) -> Slot | None:
        """An empty slot, or the one whose weights are needed last, if that is later than `later_than` entries ahead."""
        best: Slot | None = None
        best_distance = later_than
        for slot in self._lanes[lane]:
            if slot.state is SlotState.EMPTY:
                return slot
            if slot.state is SlotState.READY:
                assert slot.unit is not None
                ahead = distance.get(slot.unit, len(self._units) + 1)
                if ahead > best_distance:
                    best, best_distance = slot, ahead
        return best

    def _fill(self, number: int, slot: Slot, *, is_urgent: bool) -> None:
        self._empty(slot)
        unit = self._units[number]
        # In this order an interrupt leaves a slot that nobody takes for empty, or for filled: `reset` recovers it.
        slot.state = SlotState.FILLING
        slot.ticket = self.store.fetch(unit.name, slot.memory, is_urgent=is_urgent)
        slot.unit, unit.slot = number, slot
        self.num_reads += 1
        self.read_bytes += self.store.read_bytes(unit.name)
        if isinstance(slot.memory, DeviceMemory):
            self.copied_bytes += sum(view.nbytes for view in slot.views[number])

    def _cancel(self, slot: Slot) -> None:
        assert slot.ticket is not None
        if slot.unit is not None:
            self._units[slot.unit].slot, slot.unit = None, None
        slot.ticket.cancel()
        started = time.perf_counter()
        slot.ticket.done.wait()
        self.stall_s += time.perf_counter() - started

    def _recover(self, slot: Slot) -> None:
        """Take back a slot whose filling was interrupted before it was noted for whom it is."""
        if slot.ticket is not None:
            slot.ticket.cancel()
            slot.ticket.done.wait()
        else:
            # A reader may still write into its memory: that goes when the reader is done, and the slot gets another.
            slot.memory = slot.memory.fresh()
            for number in slot.views:
                unit = self._units[number]
                slot.views[number] = views_of(unit.bindings, unit.places, slot.memory)
        self._empty(slot)

    def _empty(self, slot: Slot) -> None:
        if slot.unit is not None:
            self._units[slot.unit].slot = None
        slot.state, slot.unit, slot.ticket, slot.filled = SlotState.EMPTY, None, None, None

    def _release(self, unit: StreamedUnit) -> None:
        slot = unit.slot
        if unit.is_bound:
            for binding in unit.bindings:
                binding.release()
            unit.is_bound = False
        if slot is not None and slot.state is SlotState.IN_USE:
            slot.mark_free()
            slot.state = SlotState.READY
