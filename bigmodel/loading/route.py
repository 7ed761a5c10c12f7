"""The way of a pass over devices: where each module runs, where what it gives goes on, where buffers are."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from bigmodel.device_map.plan import Plan
from bigmodel.device_map.unit import Unit
from bigmodel.hooks.hops import Phase, Route, Site

__all__ = ["move_buffers", "route_of", "run_devices", "site_devices"]


def run_devices(plan: Plan, phase: Phase = Phase.STEP) -> dict[str, torch.device]:
    """Unit name -> the device that computes it."""
    return {
        place.unit: torch.device(place.run_on if phase is Phase.STEP else place.prefill_on) for place in plan.placements
    }


def site_devices(
    model: nn.Module, plan: Plan, units: Sequence[Unit], unified: Collection[str] = (), phase: Phase = Phase.STEP
) -> dict[str, torch.device]:
    """Name of a module -> the device that its forward runs on, for all modules that use weights by themselves.

    Those are the sites of units (the root, "", where it is one), and tables that look rows up in a weight that another unit
    fetches for itself (an embedding that is tied to a head): they do so where the weight rests.
    """
    runs = run_devices(plan, phase)
    rests = {
        place.unit: runs[place.unit]
        if place.home not in ("cpu", "disk") or (place.run_on in unified and place.home == "cpu")
        else torch.device("cpu")
        for place in plan.placements
    }
    devices = {site: runs[unit.name] for unit in units for site in unit.sites}
    unit_of = {name: unit for unit in units for name in unit.parameters}
    first_names = {parameter: name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            unit = unit_of.get(first_names[parameter]) if parameter is not None else None
            if unit is not None and name and not any(_is_in(name, site) for site in unit.sites):
                devices.setdefault(name, rests[unit.name])
    return devices


def route_of(
    model: nn.Module,
    units: Sequence[Unit],
    devices: Mapping[str, torch.device],
    prefill_devices: Mapping[str, torch.device],
) -> Route | None:
    """Where passes go; None where all of them are on the host.

    A pass begins where the root uses weights by itself, or on the first accelerator that runs something. Modules that stand in
    a row (in a list of modules, which has no forward of its own) hand what they give to the next one where it is; everything
    else goes back to where the pass began, because code between units combines it with what is there.

    Args:
        model: the root.
        units: in order of definition.
        devices, prefill_devices: of `site_devices`, for steps and for prefill passes.
    """
    order = [site for unit in units for site in unit.sites if site]
    # What runs on accelerators in steps does so in prefill passes too.
    first = next((device for device in prefill_devices.values() if device.type != "cpu"), None)
    if first is None:
        return None
    main = devices.get("", first)
    if {*devices.values(), *prefill_devices.values()} == {main}:
        return Route(main)
    modules = dict(model.named_modules(remove_duplicate=False))
    following = dict(itertools.pairwise(order))

    def sites(devices: Mapping[str, torch.device]) -> dict[str, Site]:
        found = {}
        for site, device in devices.items():
            if not site:
                continue  # a pass begins and ends there
            parent = site.rpartition(".")[0]
            is_in_row = parent == following.get(site, "").rpartition(".")[0] and _is_row(modules[parent])
            found[site] = Site(device, None if is_in_row or device == main else main)
        return found

    own = {site: modules[site] for site in devices if site}
    if devices == prefill_devices:
        return Route(main, own, sites(devices))
    return Route(main, own, sites(devices), sites(prefill_devices))


def move_buffers(model: nn.Module, devices: Mapping[str, torch.device], main: torch.device) -> None:
    """Put buffers on the device of the module that they are in; those outside all units where passes begin."""
    moved: dict[tuple[int, torch.device], torch.Tensor] = {}
    for name, module in model.named_modules():
        above = name
        while above and above not in devices:
            above = above.rpartition(".")[0]
        device = devices.get(above, main)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                at = (id(buffer), device)
                if at not in moved:
                    moved[at] = buffer.to(device)
                module._buffers[key] = moved[at]


def _is_in(name: str, site: str) -> bool:
    return not site or name == site or name.startswith(f"{site}.")


def _is_row(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward or isinstance(module, nn.Sequential)
