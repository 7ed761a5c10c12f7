"""Activation checkpointing: what a unit's forward saves is let go, and computed again when backward comes to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute", "recomputed_units"]


def recompute(module: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """Have units keep nothing but their inputs between forward and backward, in training, where gradients are recorded.

    It is the unit's forward that is called again, not the unit: hooks of engines, which gather its weights, stay outside and
    run once. What it draws at random is drawn again as it was. A cache of keys and values, which a second forward would fill
    again, is not made in training.

    Args:
        module: all of it.
        units: of which `recomputed_units` count.

    Returns:
        Those.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    chosen = recomputed_units(units)
    for unit in chosen:
        unit.forward = _recomputed(unit, unit.forward)
    if chosen and "use_cache" in inspect.signature(module.forward).parameters:
        module.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return chosen


def recomputed_units(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that consist of other modules: nothing is won with a single layer."""
    return [unit for unit in units if any(True for _ in unit.children())]


def _recomputed(unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not (unit.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


def _without_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if not (module.training and torch.is_grad_enabled()):
        return None
    return args, {**kwargs, "use_cache": False}
