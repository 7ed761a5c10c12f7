"""The way of a pass over devices: where each unit runs, where what it gives goes on, where buffers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bigmodel.device_map.plan import Plan
from bigmodel.device_map.unit import Unit
from bigmodel.hooks.hops import Route

__all__ = ["move_buffers", "route_of", "run_devices"]


def run_devices(plan: Plan) -> dict[str, torch.device]:
    """Unit name -> the device that computes it."""
    return {placement.unit: torch.device(placement.run_on) for placement in plan.placements}


def route_of(model: nn.Module, plan: Plan, units: Sequence[Unit]) -> Route | None:
    """Where a pass goes; None where all of it is on the host.

    A pass begins on the first accelerator that runs something. Modules that stand in a row (in a list of modules, which has no
    forward of its own) hand what they give to the next one where it is; everything else goes back to where the pass began,
    because code between units combines it with what is there.
    """
    runs = run_devices(plan)
    main = next((runs[unit.name] for unit in units if runs[unit.name].type != "cpu"), None)
    if main is None:
        return None
    sites: dict[str, tuple[nn.Module, torch.device, torch.device | None]] = {}
    if set(runs.values()) != {main}:
        modules = dict(model.named_modules(remove_duplicate=False))
        order = [(site, runs[unit.name]) for unit in units for site in unit.sites if site]
        for number, (site, device) in enumerate(order):
            following = order[number + 1][0] if number + 1 < len(order) else ""
            parent = site.rpartition(".")[0]
            is_in_row = parent == following.rpartition(".")[0] and _is_row(modules[parent])
            # Parts of one module that a map divides share its hooks: they run on one device.
            sites[site] = (modules[site], device, None if is_in_row or device == main else main)
    return Route(main, sites)


def move_buffers(model: nn.Module, units: Sequence[Unit], runs: Mapping[str, torch.device], main: torch.device) -> None:
    """Put buffers on the device of the unit that they are in; those outside all units where passes begin."""
    device_at = {site: runs[unit.name] for unit in units for site in unit.sites if site}
    moved: dict[tuple[int, torch.device], torch.Tensor] = {}
    for name, module in model.named_modules():
        above = name
        while above and above not in device_at:
            above = above.rpartition(".")[0]
        device = device_at.get(above, main)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                at = (id(buffer), device)
                if at not in moved:
                    moved[at] = buffer.to(device)
                module._buffers[key] = moved[at]


def _is_row(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward or isinstance(module, nn.Sequential)
