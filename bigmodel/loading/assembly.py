"""Carries a plan out: puts every weight of a module on meta where the plan says it rests, and hooks what streams."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint.spec import Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.unit import Unit
from bigmodel.hooks.attach import Attachment, PassCheck
from bigmodel.hooks.hops import Phase, Route
from bigmodel.hooks.slots import Binding, DataBinding, EntryBinding
from bigmodel.hooks.stats import StreamStats
from bigmodel.hooks.streamer import Streamer
from bigmodel.loading.assembled import Assembled, remember
from bigmodel.loading.marks import mark_dispatched
from bigmodel.loading.pass_limit import kind_of
from bigmodel.loading.route import move_buffers, route_of, run_devices, site_devices
from bigmodel.loading.supply import Supply, crossing_units, streamed_units
from bigmodel.models import owners_of
from bigmodel.offload.converted import cached_conversions
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.file_map import FileMap
from bigmodel.offload.resident import ResidentLoad
from bigmodel.offload.resting import resting_parameter
from bigmodel.offload.spill import Spill
from bigmodel.progress import Report

__all__ = ["Assembly"]


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
        self._owners = owners_of(model)
        self._names = dict(model.named_parameters())

    def keep_all(self, load: ResidentLoad, decide: Callable[[], tuple[Plan, Sequence[Unit]]]) -> None:
        """Put every weight in place from files that are being read whole; the plan is made when somebody asks for it."""
        self._place(load.give(list(self._sources.values())))
        remember(self._model, Assembled(decide=decide, stamps=self._stamps, sizes=_sizes(load)))

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
        homes = {placement.unit: placement.home for placement in plan.placements}
        at = {name: unit.name for unit in units for name in unit.parameters}
        crossing = {name for unit in crossing_units(plan, units) for name in unit.parameters}
        away = {
            name: self._sources[name] for name in self._names if name in self._sources and homes[at[name]] == "disk"
        }
        # Buffers that the checkpoint holds stay whatever the plan says.
        staying = [source for name, source in self._sources.items() if name not in crossing and name not in away]
        load = early or ResidentLoad(staying, stamps=self._stamps, may_map=False, progress=self._progress)
        supply: Supply | None = None
        try:
            away |= self._cache_converted(away)
            room = _RoomAtRest(plan)
            bindings = self._rest(away, room, gathered=_gathered_names(plan, units))
            supply = Supply(
                plan,
                units,
                self._sources | away,
                stamps=self._stamps,
                unified=unified,
                progress=self._progress,
            )
            bindings |= self._put_across(supply, run_devices(plan, Phase.PREFILL))
            self._place(load.finish() if early is None else load.give(staying))
            route = self._route(plan, units, unified)
            streamer = supply.streamer(bindings)
        except BaseException:
            if supply is not None:
                supply.close()
            raise
        finally:
            load.close()
        sizes = _sizes(load)
        sizes = replace(sizes, resident_bytes=sizes.resident_bytes + supply.host_bytes)
        is_elsewhere = bool(away) or route is not None
        attachment = None
        if streamer is not None or check_pass is not None or is_elsewhere:
            attachment = self._attach(plan, units, streamer, check_pass, sizes, route, is_elsewhere=is_elsewhere)
            room.attachment = weakref.ref(attachment)
        state = Assembled(
            decide=lambda: (plan, units),
            attachment=attachment,
            streamed=away,
            bindings=bindings,
            stamps=self._stamps,
            sizes=sizes,
        )
        remember(self._model, state)
        if is_elsewhere:
            is_streamed = streamer is not None or bool(away)
            state.compile_before = mark_dispatched(self._model, units, run_devices(plan), is_streamed=is_streamed)

    def _route(self, plan: Plan, units: Sequence[Unit], unified: Collection[str]) -> Route | None:
        """The way of passes over devices; buffers are put where it leads."""
        devices, prefill_devices = (
            site_devices(self._model, plan, units, unified, phase) for phase in (Phase.STEP, Phase.PREFILL)
        )
        route = route_of(self._model, units, devices, prefill_devices)
        if route is not None:
            move_buffers(self._model, devices, route.main)
        return route

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
            for number, unit in enumerate(streamed_units(plan, units))
        }
        streamed = {module for found in sites.values() for _, module in found}
        resting = [modules[site] for unit in units for site in unit.sites if site and not unit.encloses]
        resting = [each for each in resting if each not in streamed and any(True for _ in each.children())]
        try:
            entries = _entries(self._model, units)
            return Attachment(
                self._model,
                streamer,
                sites,
                entries,
                check_pass or kind_of,
                sizes,
                refuses_moves=is_elsewhere,
                resting=resting,
                route=route,
            )
        except BaseException:
            if streamer is not None:
                streamer.close()
            raise

    def _put_across(self, supply: Supply, devices: Mapping[str, torch.device]) -> dict[str, Binding]:
        """Give parameters the tensors that accelerators run with, and bind those that rest on the host."""
        tensors, on_host = supply.finish()
        bindings: dict[str, Binding] = {}
        for name, tensor in tensors.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            self._replace(name, parameter)
            if name in on_host:
                bindings[name] = DataBinding(name, parameter, tensor)
        for unit in supply.crossing:
            for name in unit.parameters:
                if name not in self._sources:  # initialised: it goes where its unit runs
                    there = self._names[name].detach().to(devices[unit.name])
                    self._replace(name, nn.Parameter(there, requires_grad=False))
        return bindings

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
