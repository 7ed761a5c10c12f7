"""Passes beyond the planned workload: they run while they fit, and are refused before they allocate."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bigmodel.device_map.cost import ModelCosts
from bigmodel.device_map.plan import Plan
from bigmodel.device_map.trial import NotTriedError, Trial, like
from bigmodel.errors import DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["PassLimit"]

logger = logging.getLogger("bigmodel.loading")

_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
# As large as the tokens are many, and counted with them.
_BESIDE_TOKENS = ("mask", "position_ids", "token_type_ids", "labels", "cache_position")
_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class PassLimit:
    """Refuses a pass beyond the planned workload that would not fit; called before anything is allocated.

    What tokens take follows from what was measured. A pass with other inputs (images, sound, states), or of a part of the
    model, is tried on tensors that hold nothing when its shapes are first seen.

    Attributes:
        costs: what a pass of any number of tokens takes.
        plan: what there is.
        trial: of the model.
        planned: name -> shape of the inputs that the workload's passes were tried with.
    """

    costs: ModelCosts
    plan: Plan
    trial: Trial
    planned: Mapping[str, tuple[int, ...]]
    _seen: dict[object, int] = field(default_factory=dict)

    def __call__(self, entry: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at a call.

        Args:
            entry: the module's name in the model; "" for the root.
            module: what is called.
            args, kwargs: with what.

        Raises:
            DoesNotFitError: it would not fit; with both numbers and the workload to state.
        """
        inputs = dict(_named(module, args, kwargs))
        shape = _token_shape(inputs, kwargs)
        others = [name for name, tensor in inputs.items() if not self._is_planned(name, tensor)]
        workload = self.plan.workload
        if shape is None or others:
            needed = self._try(entry, args, kwargs, inputs)
            said = ", ".join(f"{name} {list(inputs[name].shape)}" for name in others or inputs)
            self._refuse_beyond(needed, f"A pass with {said} needs {format_bytes(needed)}", "Make its inputs smaller")
            return
        batch_size, num_tokens, past_tokens = shape
        total = past_tokens + num_tokens
        if (
            batch_size <= workload.batch_size
            and total <= workload.total_tokens
            and num_tokens <= workload.prompt_tokens
        ):
            return
        kv_bytes = self.costs.kv_bytes(batch_size, total)
        activation_bytes = self.costs.activation_bytes(batch_size, num_tokens, past_tokens)
        self._refuse_beyond(
            kv_bytes + activation_bytes,
            f"A pass of {batch_size} x {num_tokens} tokens after {past_tokens} needs {format_bytes(kv_bytes)} of KV cache "
            f"and {format_bytes(activation_bytes)} of activations",
            f"Load with workload=Workload(batch_size={batch_size}, prompt_tokens={max(1, total)})",
        )

    def _is_planned(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether an input is tokens, goes with them, or is no larger than what was tried."""
        if name in _TOKEN_INPUTS or any(name.endswith(each) for each in _BESIDE_TOKENS) or tensor.ndim < 2:
            return True
        known = self.planned.get(name)
        return known is not None and len(known) == tensor.ndim and all(map(int.__le__, tensor.shape, known))

    def _try(
        self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]
    ) -> int:
        """What a call takes, in bytes; 0 where it cannot be tried."""
        key = (entry, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items()))
        if key not in self._seen:
            try:
                tried = self.trial(lambda: like(args, kwargs), entry=entry)
                needed = tried.peak_bytes + tried.kv_bytes
            except NotTriedError as error:
                logger.debug("a pass could not be tried, and runs unchecked: %s", error)
                needed = 0
            if len(self._seen) >= _REMEMBERED:
                self._seen.clear()
            self._seen[key] = needed
        return self._seen[key]

    def _refuse_beyond(self, needed: int, what: str, advice: str) -> None:
        plan = self.plan
        available = plan.limits["cpu"] - plan.estimate.peak_bytes["cpu"] + plan.kv_bytes + plan.activation_bytes
        if needed > available:
            raise DoesNotFitError(
                f"{what}, and {format_bytes(max(0, available))} is left beside the weights. {advice}, or give a larger "
                "max_memory['cpu'].",
                tier="cpu",
                needed_bytes=needed,
                available_bytes=max(0, available),
            )


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a module is called with, by the names of its forward's parameters."""
    if args:
        names = [
            parameter.name
            for parameter in inspect.signature(module.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        for number, value in enumerate(args):
            if isinstance(value, torch.Tensor):
                yield names[number] if number < len(names) else f"argument {number}", value
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            yield name, value


def _token_shape(inputs: Mapping[str, torch.Tensor], kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(sequences, tokens of this pass, tokens before it) of a forward call; None where its inputs are no tokens."""
    shapes = [tuple(inputs[name].shape[:2]) for name in _TOKEN_INPUTS if name in inputs and inputs[name].ndim >= 2]
    if not shapes:
        return None
    cache: Any = kwargs.get("past_key_values")
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes), int(past)
