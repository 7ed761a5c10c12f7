"""What a micro-batch's loss weighs in the mean over all predicted labels of a global batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bigmodel.errors import InvalidArgumentError

__all__ = ["COUNT_KEY", "IGNORED", "CountItems", "counted_labels", "is_divided", "losses_of_counts", "refuse_strange"]

IGNORED = -100
"""A label that is not predicted."""
COUNT_KEY = "num_items_in_batch"
CountItems = Callable[[Mapping[str, Any]], int]
_NEAR = 1e-5


def counted_labels(module: nn.Module) -> CountItems:
    """How many labels of a micro-batch this model predicts.

    A causal language model predicts none for a sequence's first token; encoder-decoders and all others predict each.
    """
    function = getattr(getattr(module, "loss_function", None), "__name__", "")
    config = getattr(module, "config", None)
    shifts = function == "ForCausalLMLoss" and not getattr(config, "is_encoder_decoder", False)

    def count(batch: Mapping[str, Any]) -> int:
        labels = batch["labels"]
        return int(((labels[..., 1:] if shifts and labels.ndim > 1 else labels) != IGNORED).sum())

    return count


def losses_of_counts(
    module: nn.Module, model: nn.Module, batch: Mapping[str, Any], count: int
) -> tuple[float, float] | None:
    """A micro-batch's loss where the model is told this number of items, and twice it: many accept the number and ignore it.

    Two passes without gradients; random generators are put back. All processes call it together.

    Args:
        module: the user's, for its signature.
        model: what is called.
        batch: a micro-batch, on the model's device.
        count: of its labels.

    Returns:
        None where the model does not take the number.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(each.name == COUNT_KEY or each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    device = _device(batch)
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    found = []
    for times in (1, 2):
        with torch.random.fork_rng(devices=devices, device_type=kind), torch.no_grad():
            try:
                outputs = model(**batch, **{COUNT_KEY: torch.tensor(times * max(1, count), device=device)})
            except TypeError:  # what it hands the number on to does not take it
                return None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None:
            return None
        found.append(float(loss))
    return found[0], found[1]


def refuse_strange(name: str, losses: tuple[float, float], count: int) -> None:
    """InvalidArgumentError where a loss follows the number that it is told in another way than by dividing."""
    one, two = losses
    if not _are_near(one, two) and not _are_near(one, 2 * two):
        raise InvalidArgumentError(
            f"The loss of {name} is {one:.6g} with {COUNT_KEY}={count} and {two:.6g} with twice that: it neither divides by it "
            "nor ignores it, so it is not known how micro-batches add up. Give prepare(count_items=function of a batch) and call "
            "run.loss(sum of the losses, batch)."
        )


def is_divided(losses: tuple[float, float]) -> bool:
    """Whether the loss was divided by the number."""
    return _are_near(losses[0], 2 * losses[1])


def _are_near(one: float, other: float) -> bool:
    return abs(one - other) <= _NEAR * max(abs(one), abs(other))


def _device(batch: Mapping[str, Any]) -> torch.device:
    return next((value.device for value in batch.values() if isinstance(value, torch.Tensor)), torch.device("cpu"))
