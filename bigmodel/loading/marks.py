"""What transformers and PEFT look for on a model that was dispatched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.unit import Unit

__all__ = ["mark_dispatched", "unmark_dispatched"]


class _IoHook:
    """What transformers' generate looks for on the encoder of a model with a device map, instead of adding Accelerate's hook."""

    io_same_device = False


def mark_dispatched(
    model: nn.Module, units: Sequence[Unit], runs: Mapping[str, torch.device], *, is_streamed: bool
) -> tuple[bool | None] | None:
    """Tell transformers and PEFT what they ask of a model that was dispatched; returns what was set before."""
    model.hf_device_map = {site: runs[unit.name] for unit in units for site in unit.sites}  # type: ignore[assignment]
    if _is_encoder_decoder(model):
        model.get_encoder()._hf_hook = _IoHook()  # type: ignore[operator]
    settings: Any = getattr(model, "generation_config", None)
    if settings is None or not is_streamed:
        return None
    # A compiled graph would keep the slot's bytes of the pass in which it was made.
    before: bool | None = settings.disable_compile
    settings.disable_compile = True
    return (before,)


def unmark_dispatched(model: nn.Module, compile_before: tuple[bool | None] | None) -> None:
    """Take that back; `compile_before` is what `mark_dispatched` gave."""
    model.__dict__.pop("hf_device_map", None)
    if compile_before is not None:
        (model.generation_config.disable_compile,) = compile_before  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module.__dict__.get("_hf_hook"), _IoHook):
            del module._hf_hook


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and callable(getattr(model, "get_encoder", None))
