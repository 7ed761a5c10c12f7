"""Where slots are filled from, and what accelerators keep: links, threads, stores and slots, as a plan says."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.device_map.plan import Plan, SlotGroup
from bigmodel.device_map.unit import Unit
from bigmodel.hooks.hops import Phase
from bigmodel.hooks.slots import Binding
from bigmodel.hooks.streamer import StreamedUnit, Streamer
from bigmodel.loading.route import run_devices
from bigmodel.offload.arena import Arena
from bigmodel.offload.crossing import Crossing, Traveller
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.disk import DiskStore
from bigmodel.offload.link import DeviceMemory, Link, Ring
from bigmodel.offload.meter import Flow, Meter, Reads
from bigmodel.offload.ranges import Layout
from bigmodel.offload.reader import Reader, layout_of
from bigmodel.offload.resident import NUM_READERS
from bigmodel.offload.slabs import SlabStore
from bigmodel.offload.store import Store, Tiers
from bigmodel.progress import Report

__all__ = ["Supply", "crossing_units", "streamed_units"]


class Supply:
    """Begins to read what accelerators keep when it is made; then gives its tensors, and the streamer.

    Args:
        plan, units: what rests and runs where.
        sources: parameter name -> where its bytes are; of those that rest on disk, where they stream from.
        stamps: of files, taken when their headers were checked.
        unified: accelerators that share the host's memory: what rests on the host rests with them.
        progress: called with (phase, done bytes, total bytes).

    Attributes:
        crossing: units that accelerators run, in some phase, and that do not rest on disk.
        host_bytes: of those among them that rest in host memory.
    """

    def __init__(
        self,
        plan: Plan,
        units: Sequence[Unit],
        sources: Mapping[str, Source],
        *,
        stamps: Mapping[str, FileStamp],
        unified: Collection[str],
        progress: Report,
    ) -> None:
        self._plan = plan
        self._streamed = streamed_units(plan, units)
        # Where a unit is fetched to, or runs where it rests: what runs on the host in steps alone is fetched in prefill passes.
        self._targets = run_devices(plan, Phase.PREFILL)
        devices = {device for device in self._targets.values() if device.type != "cpu"}
        self._links = {device: Link(device) for device in sorted(devices, key=str)}
        self._ring: Ring | None = None
        self.crossing = crossing_units(plan, units)
        self._layouts = self._lay_out(sources)
        travellers = [self._traveller(unit, sources, unified) for unit in self.crossing]
        self._reader = self._begin(travellers, self._layouts.values(), stamps)
        self._crossing: Crossing | None = None
        try:
            if self._reader is not None and travellers:
                direct = DirectReads(stamps)
                self._crossing = Crossing(travellers, reader=self._reader, direct=direct, progress=progress)
        except BaseException:
            self.close()
            raise
        self.host_bytes = 0 if self._crossing is None else self._crossing.host_bytes

    def finish(self) -> tuple[dict[str, torch.Tensor], set[str]]:
        """Tensors of the parameters of units that cross, and the names of those that rest in host memory.

        Raises:
            ReadError: a file could not be read, or changed since its header was checked.
        """
        if self._crossing is None:
            return {}, set()
        tensors = self._crossing.finish()
        on_host = {name for unit in self.crossing if unit.name in self._crossing.slabs for name in unit.parameters}
        return tensors, on_host & tensors.keys()

    def streamer(self, bindings: Mapping[str, Binding]) -> Streamer | None:
        """What moves units through slots; None where none do. Threads that nobody needs any more end.

        Args:
            bindings: of all parameters that do not rest where they run.
        """
        slabs = {} if self._crossing is None else self._crossing.slabs
        needs_ring = self._crossing is not None and self._crossing.needs_ring
        stores: dict[str, Store] = dict.fromkeys(slabs, SlabStore(slabs, self._reader if needs_ring else None))
        if self._reader is not None:
            stores |= dict.fromkeys(self._layouts, DiskStore(self._reader, self._layouts))
            if not (self._layouts or needs_ring):
                self._reader.close()  # all that it was for is read
        if not self._streamed:
            return None
        steps = run_devices(self._plan)
        homes = {place.unit: place.home for place in self._plan.placements}
        lane_of = {name: number for number, group in enumerate(self._plan.slots) for name in group.units}
        streamed = []
        for unit in self._streamed:
            own = [bindings[name] for name in unit.parameters if name in bindings]
            phases = (Phase.PREFILL,) if homes[unit.name] == str(steps[unit.name]) else tuple(Phase)
            streamed.append(StreamedUnit(unit.name, own, self._places(unit.name), lane_of[unit.name], phases))
        lanes = [self._lane(group, slabs) for group in self._plan.slots]
        is_page_locked = not needs_ring and (self._ring is None or self._ring.is_page_locked)
        meter = None if self._reader is None else self._reader.meter
        flow = functools.partial(_flow, meter, list(self._links.values()), is_page_locked)
        return Streamer(streamed, lanes, Tiers(stores), flow)

    def close(self) -> None:
        """End the threads and what they have queued."""
        if self._reader is not None:
            self._reader.close()
        for link in self._links.values():
            link.drain()

    def _lay_out(self, sources: Mapping[str, Source]) -> dict[str, Layout]:
        """Unit name -> its layout in a slot, for those that stream from files."""
        found = {}
        across = {unit.name for unit in self.crossing}
        for unit in self._streamed:
            own = [sources[name] for name in unit.parameters if name in sources]
            if own and unit.name not in across:
                found[unit.name] = layout_of(own, for_accelerator=self._targets[unit.name].type != "cpu")
        return found

    def _traveller(self, unit: Unit, sources: Mapping[str, Source], unified: Collection[str]) -> Traveller:
        device = self._targets[unit.name]
        return Traveller(
            unit.name,
            [sources[name] for name in unit.parameters if name in sources],
            self._links[device],
            stays_on_host=self._plan.home_of(unit.name) == "cpu" and str(device) not in unified,
        )

    def _begin(
        self, travellers: Sequence[Traveller], layouts: Iterable[Layout], stamps: Mapping[str, FileStamp]
    ) -> Reader | None:
        """The threads that fill slots and what accelerators keep; None where there is nothing to fill."""
        staging = [layout.staging_bytes for layout in layouts]
        staging += [layout_of(unit.sources, for_accelerator=True).staging_bytes for unit in travellers]
        if not staging:
            return None
        self._ring = Ring(next(iter(self._links))) if self._links else None
        return Reader(num_threads=NUM_READERS, stamps=stamps, bounce_bytes=max(staging), ring=self._ring)

    def _places(self, unit: str) -> Mapping[str, int]:
        """Parameter name -> first byte in the unit's slot."""
        if unit not in self._layouts:
            assert self._crossing is not None
            return self._crossing.places[unit]
        layout = self._layouts[unit]
        return layout.places if self._targets[unit].type == "cpu" else layout.device_places

    def _lane(self, group: SlotGroup, slabs: Mapping[str, torch.Tensor]) -> list[Arena | DeviceMemory]:
        """The memory of a group's slots."""
        device = torch.device(group.device)
        if device.type == "cpu":
            nbytes = max(self._layouts[name].nbytes for name in group.units)
            return [Arena(nbytes) for _ in range(group.num_slots)]
        nbytes = max(slabs[name].numel() if name in slabs else self._layouts[name].device_bytes for name in group.units)
        return [DeviceMemory(nbytes, self._links[device]) for _ in range(group.num_slots)]


def _flow(meter: Meter | None, links: Sequence[Link], is_page_locked: bool) -> Flow:
    """What was read and copied up to now."""
    copies = {str(link.device): link.moved() for link in links}
    return Flow(Reads() if meter is None else meter.reads(), copies, is_page_locked)


def crossing_units(plan: Plan, units: Sequence[Unit]) -> list[Unit]:
    """Those that accelerators run, in some phase, and that do not rest on disk."""
    homes = {place.unit: place.home for place in plan.placements}
    targets = run_devices(plan, Phase.PREFILL)
    return [unit for unit in units if homes[unit.name] != "disk" and targets[unit.name].type != "cpu"]


def streamed_units(plan: Plan, units: Sequence[Unit]) -> list[Unit]:
    """Those that take turns in slots, in order of definition."""
    names = {name for group in plan.slots for name in group.units}
    return [unit for unit in units if unit.name in names]
