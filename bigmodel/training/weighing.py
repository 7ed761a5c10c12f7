"""Micro-batches of a global batch: counted before the first one, and each loss weighed as its part of the mean over all."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.losses import (
    COUNT_KEY,
    CountItems,
    counted_labels,
    is_divided,
    losses_of_counts,
    refuse_strange,
)
from bigmodel.training.processes import Processes

__all__ = ["Weighing", "loss_of", "moved"]

_MOST_NODES = 64  # what is done to a model's loss before backward is a few operations


class Weighing:
    """What each micro-batch of a global batch weighs.

    Args:
        module: the user's, which tells how it counts labels.
        model: what is called.
        processes: all of them.
        count: of a micro-batch, what its loss is a sum over; its labels that are predicted if None.

    Attributes:
        has_own_count: whether the user counts.
        divides: whether the model divides its loss by the total, once it was tried; None before.
        total: of the global batch, over all processes; 0 before the first.
    """

    def __init__(self, module: nn.Module, model: nn.Module, processes: Processes, count: CountItems | None) -> None:
        self._module, self._model, self._processes = module, model, processes
        self.has_own_count = count is not None
        self._count = count or counted_labels(module)
        self.total = 0
        self._counts: list[int] = []  # of this process's micro-batches
        self.divides: bool | None = None
        self._is_told = False  # whether the pass under way is told the total
        self._told: list[torch.Tensor] = []  # losses of this micro-batch that were divided by it

    def count(self, batch: Mapping[str, Any]) -> int:
        """Of a micro-batch, what its loss is a mean or a sum over."""
        return int(self._count(batch))

    def begin(self, batches: list[Any]) -> list[Any]:
        """Count a global batch before its first micro-batch is given."""
        has_labels = all(isinstance(each, Mapping) and isinstance(each.get("labels"), torch.Tensor) for each in batches)
        if has_labels or self.has_own_count:
            self._counts = [int(self._count(each)) for each in batches]
        else:
            self._counts = [_num_rows(each) for each in batches]
        self.total = int(self._processes.summed(torch.tensor([sum(self._counts)], dtype=torch.int64)).item())
        if not self.total:
            raise TrainingError("A global batch has no label that is predicted: all are -100. Look at the labels.")
        device = self._processes.device
        batches = [moved(each, device) for each in batches]
        if not has_labels or self.has_own_count:
            self.divides = False
            return batches
        if self.divides is None:
            self.divides = self._try(batches)
        if self.divides:
            total = torch.tensor(self.total, device=device)
            for each in batches:
                each[COUNT_KEY] = total  # of our own copies
        return batches

    def weighed(self, loss: torch.Tensor, number: int) -> torch.Tensor:
        """A model's loss for a micro-batch, as its part of the mean over the global batch.

        Args:
            loss: of the model's last pass.
            number: of the micro-batch in the global batch.
        """
        if not self.total or any(_holds(loss, each) for each in self._told):
            return loss
        return loss * (self._counts[number] / self.total)

    def look(self, number: int | None, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before each forward: whether it is told the count that its loss is divided by."""
        self._is_told = bool(self.divides) and COUNT_KEY in kwargs
        labels = kwargs.get("labels")
        if number is None or self.divides or not torch.is_grad_enabled() or not isinstance(labels, torch.Tensor):
            return None
        if not self._counts or self._counts[number] or self.has_own_count:
            return None
        # The mean over no label is not a number, nor its gradient: any label will do for what weighs nothing.
        return args, {**kwargs, "labels": torch.zeros_like(labels)}

    def saw(self, outputs: Any) -> None:
        """After each forward: its loss is divided already, if it was told the count."""
        loss = loss_of(outputs)
        if self._is_told and torch.is_grad_enabled() and isinstance(loss, torch.Tensor):
            self._told.append(loss)

    def forget(self) -> None:
        """Between micro-batches."""
        self._told.clear()

    def _try(self, batches: list[Any]) -> bool:
        """Whether the model divides its loss by the count of labels, as all processes find together.

        One whose micro-batch predicts nothing learns nothing from it.
        """
        for batch, count in zip(batches, self._counts, strict=True):
            losses = losses_of_counts(self._module, self._model, batch, count)
            if losses is None:  # a matter of signatures: the same in all processes
                return False
            strange: Exception | None = None
            if count:
                try:
                    refuse_strange(type(self._module).__name__, losses, count)
                except InvalidArgumentError as error:
                    strange = error
            divided = bool(count) and is_divided(losses)
            votes = torch.tensor([divided, bool(count) and not divided, strange is not None], dtype=torch.int64)
            num_divided, num_ignored, num_strange = self._processes.summed(votes).tolist()
            if num_strange or (num_divided and num_ignored):
                raise strange or TrainingError(
                    "In another process the loss neither divides by the count of labels nor ignores it. See its message."
                )
            if num_divided or num_ignored:
                return bool(num_divided)
        return False


def loss_of(outputs: Any) -> Any:
    """What a model returned as its loss; None where there is none."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _holds(loss: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a loss is another one, or was computed of it by a few operations."""
    if loss is part:
        return True
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead and len(seen) < _MOST_NODES:
        node = ahead.pop(0)
        if node is None or node in seen:
            continue
        if node is part.grad_fn:
            return True
        seen.add(node)
        ahead += [each for each, _ in node.next_functions]
    return False


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; containers are copied."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        there = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key, each in value.items():
            there[key] = moved(each, device)
        return there
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each, device) for each in value)
    return value


def _num_rows(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.shape[0]
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((_num_rows(each) for each in parts if isinstance(each, (torch.Tensor, Mapping, list, tuple))), 0)
