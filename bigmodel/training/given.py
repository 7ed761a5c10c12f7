"""What `prepare` is given, by position or by keyword: told apart, made, and pointed at the parameters that the engine holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bigmodel.errors import InvalidArgumentError
from bigmodel.training.strategy import Engine

__all__ = ["kind_of", "optimizer_of", "scheduler_of"]


def kind_of(given: Any) -> str:
    """model, optimizer, loader or scheduler."""
    if isinstance(given, (nn.Module, str, os.PathLike)):
        return "model"
    if isinstance(given, Optimizer):
        return "optimizer"
    if isinstance(given, (LRScheduler, ReduceLROnPlateau)):
        return "scheduler"
    if isinstance(given, (DataLoader, Dataset, IterableDataset)) or hasattr(given, "__getitem__"):
        return "loader"
    raise InvalidArgumentError(
        f"prepare was given a {type(given).__name__}. Give a model, an optimizer, a DataLoader or dataset, a scheduler; "
        "factories by keyword."
    )


def optimizer_of(given: Any, before: Mapping[str, nn.Parameter], engine: Engine) -> Optimizer | None:
    """The optimizer that prepare was given, of the parameters that take the place of those `before`; or what a factory makes."""
    if given is None:
        return None
    if not isinstance(given, Optimizer):
        made = given(list(engine.trained().values()))
        if not isinstance(made, Optimizer):
            raise InvalidArgumentError(
                f"optimizer(params) returned a {type(made).__name__}. Return a torch.optim.Optimizer."
            )
        return made
    if given.state:
        raise InvalidArgumentError("The optimizer has stepped already. Give one that has not, or load its checkpoint.")
    now = dict(engine.module.named_parameters())
    names = {id(parameter): name for name, parameter in before.items()}
    for group in given.param_groups:
        strange = [parameter for parameter in group["params"] if id(parameter) not in names]
        if strange:
            raise InvalidArgumentError(
                f"The optimizer has a parameter of shape {tuple(strange[0].shape)} that is not the model's. Build it of the "
                "parameters of the model that is given."
            )
        group["params"] = [now[names[id(parameter)]] for parameter in group["params"]]
    return given


def scheduler_of(given: Any, optimizer: Optimizer | None) -> LRScheduler | None:
    """The scheduler that prepare was given, or that it was told how to make."""
    if given is None:
        return None
    if isinstance(given, ReduceLROnPlateau):
        raise InvalidArgumentError(
            "ReduceLROnPlateau steps by a metric, and run.step knows none. Step it yourself, after run.evaluate, and do not "
            "give it to prepare."
        )
    if isinstance(given, LRScheduler):
        if given.optimizer is not optimizer:
            raise InvalidArgumentError("The scheduler is of another optimizer. Give the one that it was made for.")
        return given
    if optimizer is None:
        raise InvalidArgumentError("A scheduler was given and no optimizer. Give both.")
    made: LRScheduler = given(optimizer)
    return made
