"""The part of a key-value cache that one module makes, and how it moves between devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["cache_layer_of", "cache_layers_of", "move_cache"]


def cache_layer_of(module: nn.Module) -> int | None:
    """The number under which a module keeps its states in a cache: transformers' `layer_idx`; None where it has none."""
    number = getattr(module, "layer_idx", None)
    return number if type(number) is int else None


def cache_layers_of(module: nn.Module) -> frozenset[int]:
    """Those of all modules in it."""
    numbers = (cache_layer_of(each) for each in module.modules())
    return frozenset(number for number in numbers if number is not None)


def move_cache(given: Any, layers: Iterable[int] | None, device: torch.device) -> None:
    """Put some layers of every cache among a module's inputs on a device. The cache stays the same object.

    Args:
        given: the positional and keyword inputs.
        layers: numbers in the caches; all of them if None.
        device: where their tensors go; those that are there already stay.
    """
    for cache in _caches_in(given):
        parts = cache.layers
        for number in range(len(parts)) if layers is None else layers:
            if number < len(parts):
                _move_tensors(vars(parts[number]), device)
                if isinstance(getattr(parts[number], "device", None), torch.device):
                    parts[number].device = device


def _caches_in(given: Any) -> Iterator[Any]:
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, (tuple, list)):
        for value in given:
            yield from _caches_in(value)
    elif isinstance(getattr(given, "layers", None), list) and not isinstance(given, nn.Module):
        yield given
    else:
        # An encoder-decoder's is two.
        for name in ("self_attention_cache", "cross_attention_cache"):
            if hasattr(given, name):
                yield from _caches_in(getattr(given, name))


def _move_tensors(values: dict[Any, Any], device: torch.device) -> None:
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            if value.device != device:
                values[key] = value.to(device)
        elif isinstance(value, dict):
            _move_tensors(value, device)
