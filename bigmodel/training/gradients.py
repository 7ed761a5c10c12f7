"""The norm of all gradients, over whatever meshes they are divided, and what a global batch lost: one sum over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bigmodel.training.processes import Processes

__all__ = ["LossScale", "gradients_of", "norm_and_sums", "scale"]

_PIECE, _SMALL = 64, 1 << 16  # values


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """What this process holds of each that has one."""
    local = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return [each for each in local if each.numel()]


def norm_and_sums(
    gradients: Sequence[torch.Tensor], sums: Sequence[float], processes: Processes, num_copies: int
) -> tuple[float, list[float]]:
    """The 2-norm of all gradients, the same in every process, and the sums over processes of other numbers.

    Pieces of rows, 64 values each, are normed in float32, and their squares summed in float64, where the device has it; of small
    gradients each value is a piece. Engines divide between rows: the norm, and what is clipped by it, is then the same however
    they do, and that of ZeRO's ranges, which begin anywhere, within 1e-10. All in float32, the last bit of half a percent of
    SmolLM2's weights depended on it after one step, and in bfloat16 the loss of the third step differed by 6e-3; all in float64,
    copies of the gradients took eight times as long and 216 MiB.

    Args:
        gradients: what this process holds, in the shapes of parameters, or rows of them.
        sums: this process's.
        processes: all of them.
        num_copies: processes that hold the same part of a gradient.
    """
    wide = torch.float32 if processes.device.type == "mps" else torch.float64
    squares = float(torch.stack([_sum_of_squares(each, wide) for each in gradients]).sum()) if gradients else 0.0
    values = torch.tensor([squares / num_copies, *sums], dtype=torch.float64)
    square, *rest = processes.summed(values).tolist()
    return math.sqrt(square), rest


@torch.no_grad()
def scale(gradients: Sequence[torch.Tensor], factor: float) -> None:
    """Multiplies all of them, in place."""
    if gradients and factor != 1.0:
        torch._foreach_mul_(list(gradients), factor)


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


def _sum_of_squares(gradient: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """A scalar."""
    if gradient.numel() <= _SMALL:
        return gradient.to(wide).square().sum()
    rows = gradient.flatten(1) if gradient.ndim > 1 else gradient
    if rows.ndim < 2 or rows.shape[1] % _PIECE == 0:  # the shorter the pieces, the less their norms are off together
        rows, rest = rows.reshape(-1), rows.numel() % _PIECE
        return _sum_of_squares(rows[rows.numel() - rest :], wide) + _of_rows(
            rows[: rows.numel() - rest].view(-1, _PIECE), wide
        )
    return _of_rows(rows, wide)


def _of_rows(rows: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms.to(wide).square().sum()


def _local(gradient: Any) -> torch.Tensor:
    local: torch.Tensor = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    return local
