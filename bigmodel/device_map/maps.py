"""What users say about tiers, made strict: limits in bytes, and a home for every unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bigmodel.device_map.machine import Machine
from bigmodel.device_map.unit import Unit
from bigmodel.errors import DeviceMapError, InvalidArgumentError, join_some, shown
from bigmodel.units import parse_bytes

__all__ = ["divide_by_home", "resolve_limits", "resolve_map", "tier_of"]


def tier_of(value: Any, machine: Machine, what: str) -> str:
    """A tier's name: ``"cpu"``, ``"disk"``, or the device string of an accelerator of the machine.

    Args:
        value: an int (an accelerator's index), a torch.device, or a string such as ``"cuda:1"``, ``"cuda"``, ``"cpu"``.
        machine: whose accelerators are meant.
        what: where the value stands, for errors.

    Raises:
        DeviceMapError: it is no tier of this machine.
    """
    if value in ("cpu", "disk"):
        return str(value)
    devices = [each.device for each in machine.accelerators]
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(devices):
            return devices[value]
        raise DeviceMapError(
            f"{what} is accelerator {shown(value)}, and this machine has {len(devices)}. Use 'cpu' or 'disk'."
        )
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DeviceMapError(
            f"{what} is {shown(value)}, which is no tier. Give 'cpu', 'disk', or an accelerator's index or name."
        ) from error
    if device.type == "cpu":
        return "cpu"
    name = f"{device.type}:{device.index or 0}"
    if name not in devices:
        raise DeviceMapError(
            f"{what} is {shown(value)}, and this machine has {', '.join(devices) or 'no accelerator'}."
        )
    return name


def resolve_limits(max_memory: Mapping[Any, Any] | None, machine: Machine) -> dict[str, int]:
    """Tier -> limit in bytes.

    Args:
        max_memory: as the user gave it; not changed. An accelerator that a given dict leaves out is not used.
        machine: says what is free.

    Raises:
        InvalidArgumentError: an unknown tier, or a size that is none.
    """
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise InvalidArgumentError(f"max_memory is {shown(max_memory)}. Give a dict such as {{'cpu': '8GiB'}}.")
    stated: dict[str, int] = {}
    for key, size in (max_memory or {}).items():
        tier = tier_of(key, machine, f"The key {shown(key)} of max_memory")
        if tier in stated:
            raise InvalidArgumentError(f"max_memory states {tier} twice. Keep one of the two.")
        stated[tier] = parse_bytes(size, f"max_memory[{shown(key)}]")
    tiers = ["cpu", "disk"]
    if max_memory is None:
        tiers = [*(each.device for each in machine.own_accelerators), *tiers]
    return stated | {tier: machine.unstated_limit_bytes(tier) for tier in tiers if tier not in stated}


def resolve_map(
    device_map: Mapping[str, Any], units: Sequence[Unit], names: Sequence[str], machine: Machine
) -> dict[str, str]:
    """Parameter -> the tier that its weights rest in.

    Args:
        device_map: module or parameter names, or prefixes at module boundaries ("" is everything) -> tier; the longest
            name that covers a parameter decides.
        units: for the parameters of each.
        names: every name that is known: modules, parameters under all their names, and buffers.
        machine: for accelerators.

    Raises:
        DeviceMapError: names that are unknown, or parameters that nothing covers; all of them.
    """
    known = set(names)
    unknown = sorted((key for key in device_map if key != "" and key not in known), key=str)
    if unknown:
        raise DeviceMapError(
            f"{len(unknown)} names in device_map are not in the model: {join_some(map(shown, unknown))}. "
            f"The model has modules such as {join_some(repr(unit.name) for unit in units[:3])}."
        )
    tiers = {key: tier_of(value, machine, f"device_map[{key!r}]") for key, value in device_map.items()}
    homes: dict[str, str] = {}
    uncovered: list[str] = []
    for unit in units:
        for name in unit.parameters:
            covering = name
            while covering not in tiers and covering:
                covering = covering.rpartition(".")[0]
            if covering in tiers:
                homes[name] = tiers[covering]
            else:
                uncovered.append(name)
    if uncovered:
        raise DeviceMapError(
            f"device_map covers no tier for {len(uncovered)} parameters: {join_some(map(repr, uncovered))}. Add their "
            "modules, or a key '' for everything else."
        )
    return homes


def divide_by_home(units: Sequence[Unit], homes: Mapping[str, str]) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """Units none of whose parameters rest in different tiers, and each one's tier.

    A unit that a map divides becomes one unit for each tier, at the same sites.
    """
    divided: list[Unit] = []
    unit_homes: dict[str, str] = {}
    for unit in units:
        tiers = dict.fromkeys(homes[name] for name in unit.parameters)
        for tier in tiers:
            name = unit.name if len(tiers) == 1 else f"{unit.name} ({tier})"
            own = tuple(each for each in unit.parameters if homes[each] == tier)
            divided.append(Unit(name, own, unit.sites, unit.encloses, unit.gathers))
            unit_homes[name] = tier
    return tuple(divided), unit_homes
