"""What is done to units' forwards: compiled; and what they save let go, and computed again when backward comes to it."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigmodel.errors import InvalidArgumentError

__all__ = ["compile_units", "recompute", "recomputed_units"]


def compile_units(module: nn.Module, units: Sequence[nn.Module], backend: str, device: torch.device) -> list[nn.Module]:
    """Have torch.compile make code of units' forwards, when they are first called: hooks of engines stay outside of it.

    It is for passes that are trained on: others, which may have caches and any shape, run as they are. No cache is made in
    training, of which each unit's would be another case for the compiler.

    Args:
        module: all of it.
        units: of which `recomputed_units` count.
        backend: of torch.compile.
        device: that computes.

    Returns:
        Those.

    Raises:
        InvalidArgumentError: there is no such backend, no unit, or no C++ compiler for code on the host.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise InvalidArgumentError(f'compile_blocks is "{backend}", and torch.compile has: {", ".join(sorted(known))}.')
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise InvalidArgumentError(
            "compile_blocks needs a C++ compiler on the host, and there is none. Install g++, or leave it out."
        )
    chosen = recomputed_units(units)
    if not chosen:
        raise InvalidArgumentError("compile_blocks compiles the model's blocks, and it has none. Leave it out.")
    for unit in chosen:
        unit.forward = _trained(unit, torch.compile(unit.forward, backend=backend), unit.forward)
    _leave_cache(module)
    return chosen


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
        unit.forward = _trained(unit, functools.partial(checkpoint, unit.forward, use_reentrant=False), unit.forward)
    if chosen:
        _leave_cache(module)
    return chosen


def recomputed_units(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that consist of other modules: nothing is won with a single layer."""
    return [unit for unit in units if any(True for _ in unit.children())]


def _trained(unit: nn.Module, trained: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """One forward for passes in training whose gradients are recorded, another one for the rest."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (trained if unit.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _leave_cache(module: nn.Module) -> None:
    if "use_cache" in inspect.signature(module.forward).parameters:
        module.register_forward_pre_hook(_without_cache, with_kwargs=True)


def _without_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if not (module.training and torch.is_grad_enabled()):
        return None
    return args, {**kwargs, "use_cache": False}
