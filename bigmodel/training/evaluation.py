"""Passes that train nothing: a loss over all processes, text that is generated, and rows gathered for metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.models import is_adapted
from bigmodel.training.collectives import Collectives, mapped
from bigmodel.training.data import GlobalLoader
from bigmodel.training.strategy import Engine
from bigmodel.training.weighing import Weighing, loss_of, moved

__all__ = ["Evaluation", "generated", "mean_loss", "rows_of_all"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of all samples of an evaluation, the same in all processes.

    Attributes:
        loss: mean over the predicted labels.
        num_tokens: predicted labels.
    """

    loss: float
    num_tokens: int


def mean_loss(loader: GlobalLoader, engine: Engine, weighing: Weighing) -> Evaluation:
    """As `TrainingRun.evaluate`."""
    if not isinstance(loader, GlobalLoader):
        raise InvalidArgumentError(
            f"run.evaluate was given a {type(loader).__name__}. Give what run.prepare_eval makes of a dataset or DataLoader."
        )
    loader.restart(0)
    lost, counted = 0.0, 0
    with _evaluating(engine):
        for batch in loader:
            count, there = weighing.count(batch), moved(batch, engine.processes.device)
            outputs = engine.model(**there)
            if isinstance(outputs, torch.Tensor) and weighing.has_own_count:
                lost, counted = lost + float(outputs), counted + count
                continue
            loss = loss_of(outputs)
            if loss is None:
                raise TrainingError("The model returned no loss. Give the evaluation's samples labels.")
            if count:  # the mean over no label is not a number
                lost, counted = lost + float(loss) * count, counted + count
    total_lost, total = engine.processes.summed(torch.tensor([lost, counted], dtype=torch.float64)).tolist()
    if not total:
        raise TrainingError("The evaluation has no label that is predicted: all are -100. Look at the labels.")
    return Evaluation(loss=total_lost / total, num_tokens=int(total))


def generated(engine: Engine, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """As `TrainingRun.generate`."""
    if not callable(getattr(engine.module, "generate", None)):
        raise InvalidArgumentError(f"A {type(engine.module).__name__} has no generate. Give prepare a model that does.")
    # Where weights are gathered all processes go on until the last of them has ended.
    waits = {"synced_gpus": True} if engine.processes.size > 1 and engine.gathers else {}
    device = engine.processes.device
    if inputs and is_adapted(engine.module):  # not all of PEFT's take them by position
        inputs, options = inputs[1:], {"inputs": inputs[0], **options}
    with _evaluating(engine):
        return engine.module.generate(*moved(inputs, device), **(waits | moved(dict(options), device)))  # type: ignore[operator]


def rows_of_all(values: Any, loader: GlobalLoader, run: Collectives) -> Any:
    """As `TrainingRun.gather_for_metrics`, for the micro-batch that a loader gave last."""
    counted, size = loader.counted, run.processes.size
    rows = max(counted)
    kept = [place * size + rank for place in range(rows) for rank in range(size) if place < counted[rank]]

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or tensor.shape[0] != rows:
            raise InvalidArgumentError(
                f"A tensor of shape {tuple(tensor.shape)} has no row for each of the micro-batch's {rows} samples. Give such "
                "ones, or call run.gather."
            )
        together: torch.Tensor = run.gather(tensor)
        # Place after place goes to one process after the other.
        return together.view(size, rows, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)[kept]

    if isinstance(values, (list, tuple)) and not any(isinstance(each, (torch.Tensor, Mapping)) for each in values):
        if len(values) != rows:
            raise InvalidArgumentError(
                f"There are {len(values)} values for the micro-batch's {rows} samples. Give one for each."
            )
        of_all = run.gather_objects(list(values))
        return [of_all[each % size][each // size] for each in kept]
    return mapped(values, ordered)


@contextlib.contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    """Without gradients, dropout, or anything left gathered; modules are in the mode that they were in afterwards."""
    trained = [module for module in engine.model.modules() if module.training]
    engine.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True
        engine.rest()
