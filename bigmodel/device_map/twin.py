"""A copy of a module tree that shares nothing with it but classes and parameters: what passes are tried on."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["SMALL_BUFFER_BYTES", "twin_of"]

# Larger buffers hold nothing in a trial; smaller ones may be what a forward decides by.
SMALL_BUFFER_BYTES = 64 << 10
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size)


def twin_of(model: nn.Module, stand_ins: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A module tree of the same classes and parameters, with attributes and small buffers of its own, and no hooks.

    With `stand_ins`, lists are shortened to two blocks of a kind, and it is told the twin's block for each of the model's.
    """
    modules = list(model.modules())
    twins: dict[nn.Module, nn.Module] = {module: object.__new__(type(module)) for module in modules}
    memo: dict[int, Any] = {id(module): twin for module, twin in twins.items()}
    for module in modules:
        memo |= {id(each): each for each in module._parameters.values() if each is not None}
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                is_small = buffer.nbytes <= SMALL_BUFFER_BYTES
                memo[id(buffer)] = buffer.detach().clone() if is_small else buffer
    shortened: set[nn.Module] = (
        set()
    )  # what is inside a kept block is not shortened again: who made a cache would not show
    for module, twin in twins.items():
        for key, value in vars(module).items():
            twin.__dict__[key] = _own_hooks(value) if key.endswith(("_hooks", "_pre_hooks")) else _copied(value, memo)
        if stand_ins is None or not isinstance(module, nn.ModuleList) or module in shortened:
            continue
        shortened.update(each for child in module for each in child.modules())
        kinds = _kinds([child for child in module._modules.values() if child is not None])
        if any(len(alike) > 2 for alike in kinds):
            stands = {first: first for first, *_ in kinds} | {
                each: others[0] for _, *others in kinds for each in others
            }
            kept = [child for child in module._modules.values() if child is not None and stands[child] is child]
            twin.__dict__["_modules"] = {str(number): twins[child] for number, child in enumerate(kept)}
            stand_ins.update({child: twins[kind] for child, kind in stands.items()})
    return twins[model]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """An attribute's value, to be changed without the original's changing; itself where it cannot be copied."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, types.FunctionType):
        return _rebound(value, memo)
    if isinstance(value, functools.partial):
        keywords = {key: _reached(each, memo) for key, each in value.keywords.items()}
        return functools.partial(_copied(value.func, memo), *(_reached(each, memo) for each in value.args), **keywords)
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, memo), _copied(value.__self__, memo))
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, modules of Python, and whatever refuses
        return value


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """A function that was put in place of a module's own: where it reaches modules of the model, it is to reach the twin's."""
    closure = getattr(function, "__closure__", None) or ()
    defaults = getattr(function, "__defaults__", None) or ()
    own = getattr(function, "__kwdefaults__", None) or {}
    if not isinstance(function, types.FunctionType) or not (closure or defaults or own):
        return function
    if id(function) in memo:
        return memo[id(function)]
    cells = tuple(types.CellType() for _ in closure)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, closure=cells or None)
    memo[id(function)] = made
    made.__defaults__ = tuple(_reached(each, memo) for each in defaults) or None
    made.__kwdefaults__ = {key: _reached(each, memo) for key, each in own.items()} or None
    made.__dict__.update({key: _reached(each, memo) for key, each in vars(function).items()})
    for cell, before in zip(cells, closure, strict=True):
        with contextlib.suppress(ValueError):  # an empty one stays so
            cell.cell_contents = _reached(before.cell_contents, memo)
    return made


def _reached(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _copied(value, memo)
    return memo.get(id(value), value) if isinstance(value, nn.Module) else value


def _own_hooks(hooks: Any) -> Any:
    """Of a module's hooks those that are part of its arithmetic: torch's own, such as weight_norm's, and ours that say so."""
    if not isinstance(hooks, dict):
        return hooks
    return type(hooks)((key, hook) for key, hook in hooks.items() if _is_arithmetic(hook))


def _is_arithmetic(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils") or getattr(hook, "is_arithmetic", False)


def _kinds(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Blocks that cost the same, together."""
    described = [_settings(block) for block in blocks]
    if not described:
        return []
    # A block knows its own number; what equals it in every block says nothing about what the block costs.
    numbers = {
        key
        for key in described[0]
        if all(type(own.get(key)) is int and own[key] == number for number, own in enumerate(described))
    }
    kinds: dict[object, list[nn.Module]] = {}
    for block, own in zip(blocks, described, strict=True):
        kinds.setdefault(tuple((key, own[key]) for key in own if key not in numbers), []).append(block)
    return list(kinds.values())


def _settings(block: nn.Module) -> dict[tuple[str, str], object]:
    """What a block's cost may depend on: classes, parameters, and plain attributes, of all modules in it."""
    found: dict[tuple[str, str], object] = {}
    for name, module in block.named_modules():
        found[name, ""] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, type(None))):
                found[name, key] = value
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[name, key] = (tuple(parameter.shape), parameter.dtype)
    return found
