"""Modules whose parameters are on meta: built so, or refused where they are not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from bigmodel.errors import InvalidArgumentError

__all__ = ["call_on_meta", "owners_of", "refuse_meta_buffers", "refuse_real"]


def refuse_real(model: nn.Module) -> nn.Module:
    """The module itself; InvalidArgumentError if a parameter of it is not on meta."""
    real = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    if real:
        raise InvalidArgumentError(
            f"model= holds {len(real)} parameters with memory of their own, {real[0]!r} the first, on "
            f"{model.get_parameter(real[0]).device}. Build it under torch.device('meta'), or give a callable that "
            "builds it: its parameters are then put on meta as they are created."
        )
    return model


def call_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` gives, its parameters on meta from the moment they are registered, its buffers real on the CPU.

    Raises:
        InvalidArgumentError: it is no callable, gives no module, or one with parameters that have no shape yet.
    """
    if not callable(build):
        raise InvalidArgumentError(f"model= is {build!r}. Give an nn.Module on meta or a callable that builds one.")
    builder = threading.get_ident()
    on_meta: Any = WeakTensorKeyDictionary()  # one parameter registered at two names stays one

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.device.type == "meta" or threading.get_ident() != builder:
            return None
        if nn.parameter.is_lazy(parameter):
            raise InvalidArgumentError(
                f"model= built a {type(module).__name__} whose {name!r} gets its shape at the first forward pass. Give "
                "its shape when building it."
            )
        if parameter not in on_meta:
            on_meta[parameter] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        return cast(nn.Parameter, on_meta[parameter])

    hook = register_module_parameter_registration_hook(cast(Any, move))
    try:
        with torch.device("cpu"):
            model = build()
    finally:
        hook.remove()
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"model= built {model!r}. Give a callable that builds an nn.Module.")
    return refuse_real(model)


def refuse_meta_buffers(buffers: Mapping[str, torch.Tensor]) -> None:
    """InvalidArgumentError if one of `buffers` (name -> buffer) is on meta."""
    lost = [name for name, buffer in buffers.items() if buffer.device.type == "meta"]
    if lost:
        raise InvalidArgumentError(
            f"model= has {len(lost)} buffers on meta that are not in the checkpoint, {lost[0]!r} the first: their "
            "values are lost. Give a callable that builds the module instead: its buffers are then real."
        )


def owners_of(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Id of a parameter -> the modules that hold it, and under which attribute: several where it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for each in module.modules():
        for attribute, parameter in each._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((each, attribute))
    return found
