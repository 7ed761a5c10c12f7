"""The norm of all gradients, over whatever meshes they are divided, and what a global batch lost: one sum over processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bigmodel.training.processes import Processes

__all__ = ["LossScale", "norm_and_sums", "scale"]


def norm_and_sums(
    parameters: Sequence[nn.Parameter], sums: Sequence[float], processes: Processes, num_copies: int
) -> tuple[float, list[float]]:
    """The 2-norm of all gradients, the same in every process, and the sums over processes of other numbers.

    Rows are normed in float32, and their squares summed in float64, where the device has it. Engines divide between rows: the
    norm, and what is clipped by it, is then the same however they do. All in float32, the last bit of half a percent of
    SmolLM2's weights depended on it after one step, and in bfloat16 the loss of the third step differed by 6e-3; all in float64,
    copies of the gradients took eight times as long and 216 MiB.

    Args:
        parameters: what is trained; those without a gradient count as zero.
        sums: this process's.
        processes: all of them.
        num_copies: processes that hold the same part of a gradient.
    """
    local = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    held = [each for each in local if each.numel()]
    wide = torch.float32 if processes.device.type == "mps" else torch.float64
    squares = float(torch.cat([_row_norms(each) for each in held]).to(wide).square().sum()) if held else 0.0
    values = torch.tensor([squares / num_copies, *sums], dtype=torch.float64)
    square, *rest = processes.summed(values).tolist()
    return math.sqrt(square), rest


@torch.no_grad()
def scale(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiplies all gradients, in place."""
    local = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    held = [each for each in local if each.numel()]
    if held and factor != 1.0:
        torch._foreach_mul_(held, factor)


class LossScale:
    """What a loss is multiplied by so that its gradients do not vanish in float16, and they are divided by.

    As torch's GradScaler has it, but that the norm, which all processes know, tells whether there was an overflow.

    Args:
        fixed: a number, or "dynamic".

    Attributes:
        value: for the next global batch.
    """

    FIRST, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000

    def __init__(self, fixed: float | str) -> None:
        self._is_dynamic = fixed == "dynamic"
        self.value = self.FIRST if self._is_dynamic else float(fixed)
        self._num_good = 0  # steps since the last change

    def update(self, is_finite: bool) -> None:
        """After a step."""
        if not self._is_dynamic:
            return
        self._num_good = self._num_good + 1 if is_finite else 0
        if not is_finite:
            self.value *= self.BACKOFF
        elif self._num_good >= self.INTERVAL:
            self.value, self._num_good = self.value * self.GROWTH, 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"value": self.value, "num_good": self._num_good}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with it, where the scale is dynamic."""
        if self._is_dynamic:
            self.value, self._num_good = state["value"], int(state["num_good"])


def _row_norms(gradient: torch.Tensor) -> torch.Tensor:
    """[rows], float32; of one dimension each value is a row."""
    if gradient.ndim < 2:
        return gradient.float().abs().reshape(-1)
    norms: torch.Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float32)
    return norms


def _local(gradient: Any) -> torch.Tensor:
    local: torch.Tensor = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    return local
