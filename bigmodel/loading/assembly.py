"""Carries a plan out: puts every weight of a module on meta where the plan says it rests, and hooks what streams."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint.spec import Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.unit import Unit
from bigmodel.errors import InvalidArgumentError
from bigmodel.hooks.attach import Attachment, PassCheck
from bigmodel.hooks.hops import Phase, Route
from bigmodel.hooks.slots import Binding, DataBinding, EntryBinding
from bigmodel.hooks.stats import StreamStats
from bigmodel.hooks.streamer import StreamedUnit, Streamer
from bigmodel.loading.marks import mark_dispatched
from bigmodel.loading.route import move_buffers, route_of, run_devices, site_devices
from bigmodel.offload.arena import Arena
from bigmodel.offload.converted import cached_conversions
from bigmodel.offload.crossing import Crossing, Traveller
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.disk import DiskStore
from bigmodel.offload.file_map import FileMap
from bigmodel.offload.link import DeviceMemory, Link, Ring
from bigmodel.offload.ranges import Layout, lay_out
from bigmodel.offload.reader import BLOCK_BYTES, GAP_BYTES, Reader
from bigmodel.offload.resident import NUM_READERS, ResidentLoad
from bigmodel.offload.resting import resting_parameter
from bigmodel.offload.slabs import SlabStore
from bigmodel.offload.spill import Spill
from bigmodel.offload.store import Store, Tiers
from bigmodel.progress import Report

__all__ = [
    "Assembled",
    "Assembly",
    "assembled",
    "forget",
    "layout_of",
    "own_generation_config",
]


@dataclass(eq=False, kw_only=True)
class Assembled:
    """What is known of a model that was put together; goes with the model.

    Attributes:
        make_plan: gives what was carried out.
        stamps: of every file that weights are read from.
        sizes: resident and mapped bytes.
        attachment: its hooks; None for a plain resident model.
        streamed: sources of the parameters that rest on disk, by first name.
        bindings: how each of those is shown.
        compile_before: (what the user had set,) of what marks a streamed model; None where nothing is marked.
    """

    make_plan: Callable[[], Plan]
    stamps: Mapping[str, FileStamp]
    sizes: StreamStats
    attachment: Attachment | None = None
    streamed: Mapping[str, Source] = field(default_factory=dict)
    bindings: Mapping[str, Binding] = field(default_factory=dict)
    compile_before: tuple[bool | None] | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        """What was carried out."""
        return self.make_plan()


_ASSEMBLED: weakref.WeakKeyDictionary[nn.Module, Assembled] = weakref.WeakKeyDictionary()


def assembled(model: nn.Module) -> tuple[nn.Module, Assembled]:
    """The model, or the first module inside it, that bigmodel loaded, and what is known of it.

    Raises:
        InvalidArgumentError: bigmodel did not load it.
    """
    for module in model.modules():
        if module in _ASSEMBLED:
            return module, _ASSEMBLED[module]
    raise InvalidArgumentError(
        f"This {type(model).__name__} was not loaded by bigmodel (or was unloaded). Load it with bigmodel.load_sharded(path)."
    )


def forget(model: nn.Module) -> None:
    """Make a model a plain one again, as far as this module knows it."""
    _ASSEMBLED.pop(model, None)


def layout_of(sources: Sequence[Source], *, for_accelerator: bool = False) -> Layout:
    """The layout of parameters in a slot or an arena; those that need a conversion are left out."""
    plain = [source for source in sources if source.conversion is None]
    return lay_out(plain, block_bytes=BLOCK_BYTES, gap_bytes=GAP_BYTES, for_accelerator=for_accelerator)


class Assembly:
    """A module on meta, and where its bytes are, on the way to a model that runs.

    Args:
        model: parameters on meta, buffers real.
        sources: first name of every distinct parameter, and of persistent buffers -> where its bytes are.
        stamps: of the checkpoint's files, taken when their headers were checked.
        content_key: identifies the checkpoint's bytes, for caches made from them.
        cache_folder: where converted weights are kept.
        allowance: what may be written to disk.
        progress: called with (phase, done bytes, total bytes).
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source],
        *,
        stamps: Mapping[str, FileStamp],
        content_key: str,
        cache_folder: Path,
        allowance: DiskAllowance,
        progress: Report,
    ) -> None:
        self._model = model
        self._sources = dict(sources)
        self._stamps = dict(stamps)
        self._content_key = content_key
        self._cache_folder = cache_folder
        self._allowance = allowance
        self._progress = progress
        self._owners = _owners(model)
        self._names = dict(model.named_parameters())

    def keep_all(self, load: ResidentLoad, make_plan: Callable[[], Plan]) -> None:
        """Put every weight in place from files that are being read whole; the plan is made when somebody asks for it."""
        self._place(load.give(list(self._sources.values())))
        _ASSEMBLED[self._model] = Assembled(make_plan=make_plan, stamps=self._stamps, sizes=_sizes(load))

    def carry_out(
        self,
        plan: Plan,
        units: Sequence[Unit],
        check_pass: PassCheck | None,
        early: ResidentLoad | None = None,
        *,
        unified: Collection[str] = (),
    ) -> None:
        """Put every weight where the plan says. On any error nothing is left running, and the module is not usable.

        Args:
            plan, units: what to do.
            check_pass: looks at passes before they begin.
            early: a load under way that can give every weight, where the plan keeps all of them.
            unified: accelerators that share the host's memory: what rests on the host rests with them.
        """
        # Where a unit is fetched to, or runs where it rests: what runs on the host in steps alone is fetched in prefill passes.
        runs = run_devices(plan, Phase.PREFILL)
        homes = {placement.unit: placement.home for placement in plan.placements}
        crossing_units = [unit for unit in units if homes[unit.name] != "disk" and runs[unit.name].type != "cpu"]
        at = {name: unit.name for unit in units for name in unit.parameters}
        crossing = {name for unit in crossing_units for name in unit.parameters}
        away_names = [name for name in self._names if name in self._sources and homes[at[name]] == "disk"]
        # Buffers that the checkpoint holds stay whatever the plan says.
        staying = [source for name, source in self._sources.items() if name not in crossing and name not in away_names]
        links = {device: Link(device) for device in sorted({*runs.values()}, key=str) if device.type != "cpu"}
        reader: Reader | None = None
        load = early or ResidentLoad(staying, stamps=self._stamps, may_map=False, progress=self._progress)
        try:
            away = {name: self._sources[name] for name in away_names}
            away |= self._cache_converted(away)
            room = _RoomAtRest(plan)
            bindings = self._rest(away, room, gathered=_gathered_names(plan, units))
            layouts = self._layouts(plan, units, away)
            travellers = [
                Traveller(
                    unit.name,
                    [self._sources[name] for name in unit.parameters if name in self._sources],
                    links[runs[unit.name]],
                    stays_on_host=homes[unit.name] == "cpu" and str(runs[unit.name]) not in unified,
                )
                for unit in crossing_units
            ]
            if layouts or travellers:
                reader = self._reader(travellers, layouts.values(), links)
            slabs: Mapping[str, torch.Tensor] = {}
            stores: dict[str, Store] = {}
            slab_bytes = 0
            keeps_reader = bool(layouts)
            places: dict[str, Mapping[str, int]] = {
                name: layout.places if runs[name].type == "cpu" else layout.device_places
                for name, layout in layouts.items()
            }
            if reader is not None and travellers:
                across = Crossing(travellers, reader=reader, direct=DirectReads(self._stamps), progress=self._progress)
                bindings |= self._put_across(across, travellers)
                slabs, slab_bytes = across.slabs, across.host_bytes
                places |= across.places
                stores |= dict.fromkeys(slabs, SlabStore(slabs, reader if across.needs_ring else None))
                keeps_reader |= across.needs_ring
            if reader is not None:
                stores |= dict.fromkeys(layouts, DiskStore(reader, layouts))
            for unit in crossing_units:
                self._move_initialised(unit.parameters, runs[unit.name])
            self._place(load.finish() if early is None else load.give(staying))
            devices, prefill_devices = (
                site_devices(self._model, plan, units, unified, phase) for phase in (Phase.STEP, Phase.PREFILL)
            )
            route = route_of(self._model, units, devices, prefill_devices)
            if route is not None:
                move_buffers(self._model, devices, route.main)
            streamer = self._streamer(plan, units, layouts, slabs, places, bindings, links, stores)
            if reader is not None and not keeps_reader:
                reader.close()  # all that it was for is read
        except BaseException:
            if reader is not None:
                reader.close()
            raise
        finally:
            load.close()
        sizes = _sizes(load)
        sizes = replace(sizes, resident_bytes=sizes.resident_bytes + slab_bytes)
        is_elsewhere = bool(away) or route is not None
        attachment = None
        if streamer is not None or check_pass is not None or is_elsewhere:
            attachment = self._attach(plan, units, streamer, check_pass, sizes, route, is_elsewhere=is_elsewhere)
            room.attachment = weakref.ref(attachment)
        _ASSEMBLED[self._model] = state = Assembled(
            make_plan=lambda: plan,
            attachment=attachment,
            streamed=away,
            bindings=bindings,
            stamps=self._stamps,
            sizes=sizes,
        )
        if is_elsewhere:
            is_streamed = streamer is not None or bool(away)
            state.compile_before = mark_dispatched(self._model, units, run_devices(plan), is_streamed=is_streamed)

    def _attach(
        self,
        plan: Plan,
        units: Sequence[Unit],
        streamer: Streamer | None,
        check_pass: PassCheck | None,
        sizes: StreamStats,
        route: Route | None,
        *,
        is_elsewhere: bool,
    ) -> Attachment:
        """The hooks; on an error the streamer is closed."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        sites = {
            number: [(unit.name, modules[site]) for site in unit.sites]
            for number, unit in enumerate(_streamed(plan, units))
        }
        try:
            entries = _entries(self._model, units)
            return Attachment(
                self._model, streamer, sites, entries, check_pass, sizes, refuses_moves=is_elsewhere, route=route
            )
        except BaseException:
            if streamer is not None:
                streamer.close()
            raise

    def _layouts(self, plan: Plan, units: Sequence[Unit], away: Mapping[str, Source]) -> dict[str, Layout]:
        """Unit name -> its layout in a slot, for those that stream from files."""
        runs = run_devices(plan, Phase.PREFILL)
        found = {}
        for unit in _streamed(plan, units):
            sources = [away[name] for name in unit.parameters if name in away]
            if sources:
                found[unit.name] = layout_of(sources, for_accelerator=runs[unit.name].type != "cpu")
        return found

    def _reader(
        self, travellers: Sequence[Traveller], layouts: Iterable[Layout], links: Mapping[torch.device, Link]
    ) -> Reader:
        """The threads that fill slots and what accelerators keep."""
        staging = [layout.staging_bytes for layout in layouts]
        staging += [layout_of(unit.sources, for_accelerator=True).staging_bytes for unit in travellers]
        ring = Ring(next(iter(links))) if links else None
        return Reader(num_threads=NUM_READERS, stamps=self._stamps, bounce_bytes=max(staging, default=0), ring=ring)

    def _put_across(self, across: Crossing, travellers: Sequence[Traveller]) -> dict[str, Binding]:
        """Give parameters the tensors that accelerators run with, and bind those that rest on the host."""
        tensors = across.finish()
        bindings: dict[str, Binding] = {}
        for unit in travellers:
            for source in unit.sources:
                parameter = nn.Parameter(tensors[source.name], requires_grad=False)
                self._replace(source.name, parameter)
                if unit.stays_on_host:
                    bindings[source.name] = DataBinding(source.name, parameter, tensors[source.name])
        return bindings

    def _move_initialised(self, names: Iterable[str], device: torch.device) -> None:
        """Parameters that are in no file go where their unit runs."""
        for name in names:
            if name not in self._sources:
                self._replace(name, nn.Parameter(self._names[name].detach().to(device), requires_grad=False))

    def _place(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self._names:
                self._replace(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self._replace_buffer(name, tensor)

    def _cache_converted(self, away: Mapping[str, Source]) -> dict[str, Source]:
        converting = [source for source in away.values() if source.conversion is not None]
        if not converting:
            return {}
        cached = cached_conversions(
            converting,
            DirectReads(self._stamps).stored,
            folder=self._cache_folder,
            content_key=self._content_key,
            allowance=self._allowance,
            progress=self._progress,
        )
        for source in cached.values():
            for extent in source.extents:
                self._stamps.setdefault(extent.file, FileStamp.of(extent.file))
        return cached

    def _rest(
        self, away: Mapping[str, Source], room: Callable[[], int], *, gathered: Collection[str]
    ) -> dict[str, Binding]:
        """Put parameters at rest where their bytes live; one that must be read when it is used may take the `room`."""
        direct, spill = DirectReads(self._stamps, room=room), Spill(allowance=self._allowance)
        maps: dict[str, FileMap] = {}
        bindings: dict[str, Binding] = {}
        for name, source in away.items():
            if source.is_view:
                file = source.extents[0].file
                view = maps.setdefault(file, FileMap(file, stamp=self._stamps.get(file))).view(
                    source, random=name in gathered
                )
                parameter = nn.Parameter(view, requires_grad=False)
                self._replace(name, parameter)
                bindings[name] = DataBinding(name, parameter, view, is_mapped=True)
            else:
                resting = resting_parameter(source, direct.parameter, name, torch.device("cpu"), spill=spill)
                owners = self._replace(name, resting)
                bindings[name] = EntryBinding(name, resting, owners)
        return bindings

    def _streamer(
        self,
        plan: Plan,
        all_units: Sequence[Unit],
        layouts: Mapping[str, Layout],
        slabs: Mapping[str, torch.Tensor],
        places: Mapping[str, Mapping[str, int]],
        bindings: Mapping[str, Binding],
        links: Mapping[torch.device, Link],
        stores: Mapping[str, Store],
    ) -> Streamer | None:
        lane_of = {name: number for number, group in enumerate(plan.slots) for name in group.units}
        units = _streamed(plan, all_units)
        if not units:
            return None
        lanes: list[list[Arena | DeviceMemory]] = []
        for group in plan.slots:
            device = torch.device(group.device)
            if device.type == "cpu":
                nbytes = max(layouts[name].nbytes for name in group.units)
                lanes.append([Arena(nbytes) for _ in range(group.num_slots)])
            else:
                nbytes = max(
                    slabs[name].numel() if name in slabs else layouts[name].device_bytes for name in group.units
                )
                lanes.append([DeviceMemory(nbytes, links[device]) for _ in range(group.num_slots)])
        steps = run_devices(plan)
        homes = {place.unit: place.home for place in plan.placements}
        streamed = []
        for unit in units:
            rests = homes[unit.name] == str(steps[unit.name])
            phases = (Phase.PREFILL,) if rests else tuple(Phase)
            names = [name for name in unit.parameters if name in bindings]
            own = [bindings[name] for name in names]
            streamed.append(StreamedUnit(unit.name, own, places[unit.name], lane_of[unit.name], phases))
        return Streamer(streamed, lanes, Tiers(stores))

    def _replace(self, name: str, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
        """Put a parameter at every place that held the one on meta, with its attributes."""
        old = self._names[name]
        parameter.__dict__.update({key: value for key, value in old.__dict__.items() if key not in parameter.__dict__})
        owners = self._owners[id(old)]
        for module, attribute in owners:
            module._parameters[attribute] = parameter
        return owners

    def _replace_buffer(self, name: str, tensor: torch.Tensor) -> None:
        parent, _, attribute = name.rpartition(".")
        old = self._model.get_submodule(parent)._buffers[attribute]
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                if buffer is old:
                    module._buffers[key] = tensor


def _sizes(load: ResidentLoad) -> StreamStats:
    return StreamStats(resident_bytes=load.private_bytes + load.mapped_bytes, mapped_bytes=load.mapped_bytes)


def _streamed(plan: Plan, units: Sequence[Unit]) -> list[Unit]:
    """Those that take turns in slots, in order of definition."""
    names = {name for group in plan.slots for name in group.units}
    return [unit for unit in units if unit.name in names]


def _entries(model: nn.Module, units: Sequence[Unit]) -> dict[str, nn.Module]:
    """Modules around units, which may be called by themselves: the encoder by generate, the model in a root by PEFT."""
    names: dict[str, None] = {}
    for unit in units:
        for site in unit.sites:
            while site:
                site = site.rpartition(".")[0]
                names[site] = None
    modules = {name: model.get_submodule(name) for name in names if name}
    return {name: module for name, module in modules.items() if type(module).forward is not nn.Module.forward}


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    return owners


def own_generation_config(model: nn.Module) -> Any:
    """The generation settings as the user has them, without what marks a streamed model; None where nothing does."""
    state = _ASSEMBLED.get(model)
    if state is None or state.compile_before is None:
        return None
    settings: Any = copy.deepcopy(model.generation_config)
    (settings.disable_compile,) = state.compile_before
    return settings


class _RoomAtRest:
    """What one read of a resting weight may take: beside a pass, only what is not planned for it."""

    def __init__(self, plan: Plan) -> None:
        self._beside_pass = max(0, plan.limits["cpu"] - plan.estimate.peak_bytes["cpu"] + plan.reserve_bytes)
        self._at_rest = self._beside_pass + plan.kv_bytes + plan.activation_bytes
        self.attachment: weakref.ref[Attachment] | None = None

    def __call__(self) -> int:
        attachment = self.attachment() if self.attachment is not None else None
        return self._beside_pass if attachment is not None and attachment.is_running else self._at_rest


def _gathered_names(plan: Plan, units: Sequence[Unit]) -> set[str]:
    """Parameters of tables that rest on disk without a slot."""
    in_slots = {name for group in plan.slots for name in group.units}
    return {name for unit in units if unit.gathers and unit.name not in in_slots for name in unit.parameters}
