"""Hops: what a module is given goes to the device that runs it, and what it gives goes on from there."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Hops", "Route", "SiteHops", "first_device", "moved"]


@dataclass(frozen=True, slots=True)
class Route:
    """The way of a pass over devices.

    Attributes:
        main: where a pass begins and what is outside all units is done.
        sites: module name -> (module, device that runs it, where its output goes; None leaves it there).
    """

    main: torch.device
    sites: Mapping[str, tuple[nn.Module, torch.device, torch.device | None]]


class Hops:
    """Moves tensors between the modules of one model.

    What several units are given in one pass (positions, masks) crosses to each device once: it is remembered as long as the
    tensor that it was made from is alive. Caches and other objects are handed on as they are.
    """

    def __init__(self) -> None:
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
            if source() is tensor and version == _version(tensor):
                return there
        there = tensor.to(device, non_blocking=device.type != "cpu")
        self._remember(tensor, there)
        return there

    def _remember(self, tensor: torch.Tensor, there: torch.Tensor) -> None:
        key = (id(tensor), there.device)
        # When its source goes, so does the copy: hidden states are not kept.
        source = weakref.ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = (source, _version(tensor), there)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
            for key, item in changed.items():
                value[key] = item
            return value
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
    """The hooks of one module: its inputs go to `device`; its output to `after`, where that is stated."""

    __slots__ = ("_after", "_device", "_hops")

    def __init__(self, hops: Hops, device: torch.device, after: torch.device | None) -> None:
        self._hops, self._device, self._after = hops, device, after

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self._hops.to(args, self._device), self._hops.to(kwargs, self._device)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return moved(output, self._after) if self._after is not None else None
