"""The norm of all gradients, over whatever meshes they are divided, and what a global batch lost: one sum over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bigmodel.training.processes import Processes

__all__ = ["clip", "norm_and_sums"]


def norm_and_sums(
    parameters: Sequence[nn.Parameter], sums: Sequence[float], processes: Processes, num_copies: int
) -> tuple[float, list[float]]:
    """The 2-norm of all gradients, the same in every process, and the sums over processes of other numbers.

    Args:
        parameters: what is trained; those without a gradient count as zero.
        sums: this process's.
        processes: all of them.
        num_copies: processes that hold the same part of a gradient.
    """
    local = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    held = [each for each in local if each.numel()]
    norms = torch._foreach_norm(held, dtype=torch.float32) if held else ()
    squares = float(torch.stack(norms).to("cpu", torch.float64).square().sum()) if norms else 0.0
    values = torch.tensor([squares / num_copies, *sums], dtype=torch.float64)
    square, *rest = processes.summed(values).tolist()
    return math.sqrt(square), rest


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], norm: float, most: float) -> None:
    """Scales all gradients so that their norm is at most `most`, in place."""
    if norm > most:
        local = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        held = [each for each in local if each.numel()]
        if held:
            torch._foreach_mul_(held, most / (norm + 1e-6))


def _local(gradient: Any) -> torch.Tensor:
    local: torch.Tensor = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    return local
