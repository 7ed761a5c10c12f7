"""Hops: what a module is given goes to the device that runs it, and what it gives goes on from there."""

from __future__ import annotations

import copy
import enum
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bigmodel.hooks.caches import cache_layers_of, move_cache

__all__ = ["Hops", "Phase", "Route", "Site", "SiteHops", "first_device", "moved"]


class Phase(enum.Enum):
    """What kind of pass: of many tokens, or of few."""

    PREFILL = enum.auto()
    STEP = enum.auto()


@dataclass(frozen=True, slots=True)
class Site:
    """What runs one module.

    Attributes:
        device: that runs it.
        after: where its output goes; None leaves it there.
    """

    device: torch.device
    after: torch.device | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """The way of a pass over devices.

    Attributes:
        main: where a pass begins and what is outside all units is done.
        modules: name -> module, of those that need hops.
        sites: name -> where it runs in a step.
        prefill_sites: the same for a prefill pass, where that differs for some.
    """

    main: torch.device
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    sites: Mapping[str, Site] = field(default_factory=dict)
    prefill_sites: Mapping[str, Site] = field(default_factory=dict)

    def ways_of(self, name: str) -> dict[Phase, Site]:
        """Where a module runs, by phase."""
        step = self.sites.get(name, Site(self.main))
        return {Phase.STEP: step, Phase.PREFILL: self.prefill_sites.get(name, step)}


class Hops:
    """Moves tensors between the modules of one model.

    What several units are given in one pass (positions, masks) crosses to each device once: it is remembered as long as the
    tensor that it was made from is alive and unchanged. Of a tensor made in inference mode nobody can tell whether it is: it
    crosses each time. Caches and other objects are handed on as they are.

    Attributes:
        phase: of the pass under way; between passes, of the one that is expected.
    """

    def __init__(self) -> None:
        self.phase = Phase.STEP
        self._known: dict[tuple[int, torch.device], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}

    def to(self, value: Any, device: torch.device) -> Any:
        """The value with all of its tensors on a device; the value itself where they are there."""
        return moved(value, device, self._tensor_on)

    def into_pass(self, value: Any, device: torch.device) -> Any:
        """The same for what a pass is given: what goes back to where it came from needs no copy."""

        def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
            there = self._tensor_on(tensor, device)
            self._remember(there, tensor)
            return there

        return moved(value, device, move)

    def forget(self) -> None:
        """A pass is over."""
        self._known.clear()

    def _tensor_on(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        key = (id(tensor), device)
        if key in self._known:
            source, version, there = self._known[key]
            if source() is tensor and version == tensor._version:
                return there
        there = tensor.to(device, non_blocking=device.type != "cpu")
        self._remember(tensor, there)
        return there

    def _remember(self, tensor: torch.Tensor, there: torch.Tensor) -> None:
        if tensor.is_inference():
            return
        key = (id(tensor), there.device)
        # When its source goes, so does the copy: hidden states are not kept.
        source = weakref.ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = (source, tensor._version, there)


def moved(value: Any, device: torch.device, move: Any = None) -> Any:
    """A value of tensors in tuples, lists and mappings, on a device.

    Args:
        value: what a module takes or gives; what is none of these is handed on.
        device: where its tensors go.
        move: (tensor, device) -> tensor there; ``Tensor.to`` if None.
    """
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        return value.to(device) if move is None else move(value, device)
    if isinstance(value, (tuple, list)):
        items = [moved(item, device, move) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        changed = {key: moved(item, device, move) for key, item in value.items()}
        changed = {key: item for key, item in changed.items() if item is not value[key]}
        if not changed:
            return value
        if isinstance(value, dict) and type(value) is not dict:  # such as a model's output: attributes follow its items
            there = copy.copy(value)  # its own stays as it is: it may be the caller's
            for key, item in changed.items():
                there[key] = item
            return there
        return dict(value) | changed
    return value


def first_device(values: Any) -> torch.device | None:
    """Of the first tensor among a module's inputs."""
    if isinstance(values, torch.Tensor):
        return values.device
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            device = first_device(value)
            if device is not None:
                return device
    return None


class SiteHops:
    """The hooks of one module: its inputs go to the device that runs it, its output to where the next ones are.

    Its part of the cache comes too, where somebody else has filled it. Where phases run the module on different devices, that
    part is at home on the device of steps: a prefill pass brings it along, and takes it back when the module is done. Its buffers
    follow it.
    """

    __slots__ = ("_buffers_on", "_changes", "_hops", "_layers", "_ways")

    def __init__(self, hops: Hops, module: nn.Module, ways: Mapping[Phase, Site]) -> None:
        self._hops, self._ways = hops, dict(ways)
        self._changes = len({site.device for site in ways.values()}) > 1
        self._layers: Collection[int] = cache_layers_of(module)
        self._buffers_on = ways[Phase.STEP].device

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        device = self._ways[self._hops.phase].device
        if self._layers:
            move_cache((args, kwargs), self._layers, device)
        if self._changes:
            self.move_buffers(module, device)
        return self._hops.to(args, device), self._hops.to(kwargs, device)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._changes and self._layers:
            move_cache((args, kwargs), self._layers, self._ways[Phase.STEP].device)
        after = self._ways[self._hops.phase].after
        return moved(output, after) if after is not None else None

    def move_buffers(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Put the module's buffers on a device; on the one of steps, where none is named."""
        device = device or self._ways[Phase.STEP].device
        if device == self._buffers_on:
            return
        for each in module.modules():
            for key, buffer in each._buffers.items():
                if buffer is not None:
                    each._buffers[key] = buffer.to(device)
        self._buffers_on = device
