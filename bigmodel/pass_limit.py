"""Passes beyond the planned workload: they run while they fit, and are refused before they allocate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.cost import ModelCosts
from bigmodel.device_map.plan import Plan
from bigmodel.errors import DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["PassLimit", "pass_shape"]

_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True, slots=True)
class PassLimit:
    """Refuses a pass beyond the planned workload that would not fit; called at the root, before anything is allocated.

    Attributes:
        costs: what a pass of any size takes.
        plan: what there is.
    """

    costs: ModelCosts
    plan: Plan

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        shape = pass_shape(args, kwargs)
        if shape is None:
            return
        batch_size, num_tokens, past_tokens = shape
        workload = self.plan.workload
        total = past_tokens + num_tokens
        is_planned = (
            batch_size <= workload.batch_size
            and total <= workload.total_tokens
            and num_tokens <= workload.prompt_tokens
        )
        if is_planned:
            return
        kv_bytes = self.costs.kv_bytes(batch_size, total)
        activation_bytes = self.costs.activation_bytes(batch_size, num_tokens, past_tokens)
        plan = self.plan
        fixed = plan.estimate.peak_bytes["cpu"] - plan.kv_bytes - plan.activation_bytes
        available = plan.limits["cpu"] - fixed
        if kv_bytes + activation_bytes > available:
            raise DoesNotFitError(
                f"A pass of {batch_size} x {num_tokens} tokens after {past_tokens} needs {format_bytes(kv_bytes)} of KV cache "
                f"and {format_bytes(activation_bytes)} of activations, and {format_bytes(available)} is left beside the "
                f"weights. Load with workload=Workload(batch_size={batch_size}, prompt_tokens={max(1, total)}), or a "
                "larger max_memory['cpu'].",
                tier="cpu",
                needed_bytes=kv_bytes + activation_bytes,
                available_bytes=max(0, available),
            )


def pass_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(sequences, tokens of this pass, tokens before it) of a forward call; None where its inputs do not say."""
    given = [kwargs.get(name) for name in _TOKEN_INPUTS] + list(args[:1])
    shapes = [tuple(each.shape[:2]) for each in given if isinstance(each, torch.Tensor) and each.ndim >= 2]
    if not shapes:
        return None
    cache: Any = kwargs.get("past_key_values")
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes), int(past)
