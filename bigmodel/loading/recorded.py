"""What a pass that is recorded takes with its backward, tried on a model as it is then: with the adapters that it was given."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.rates import Work
from bigmodel.device_map.rehearsal import rehearse
from bigmodel.device_map.trial import Call
from bigmodel.models import example_inputs

__all__ = ["Recorded"]

logger = logging.getLogger("bigmodel.loading")


@dataclass(frozen=True, slots=True)
class Recorded:
    """Bytes and work of passes of a model, and of their backward.

    Attributes:
        model: not held.
        units: names of the modules that run under checkpointing.
    """

    model: weakref.ref[nn.Module]
    units: tuple[str, ...]
    _seen: dict[tuple[int, int, int], tuple[int, Work | None]] = field(default_factory=dict)

    @property
    def num_trained(self) -> int:
        """Values of the model that are trained."""
        model = self.model()
        return 0 if model is None else sum(each.numel() for each in model.parameters() if each.requires_grad)

    def tried(self, batch_size: int, num_tokens: int, *, adapts: bool = False) -> tuple[int, Work | None]:
        """What a pass of so many tokens a sequence takes with its backward.

        Args:
            batch_size, num_tokens: of the pass.
            adapts: whether the model has no adapters yet, and is tried with some on all products.

        Returns:
            The most bytes that it holds beside the weights, and its work; 0 and None where it cannot be tried.
        """
        model = self.model()
        if model is None:
            return 0, None
        key = batch_size, num_tokens, -1 if adapts else self.num_trained
        if key not in self._seen:

            def call() -> Call:
                inputs = example_inputs(model, batch_size, num_tokens)
                if inputs is None:
                    raise NotTriedError("nothing is known that the model's forward could be called with")
                tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
                labels = {} if tokens is None else {"labels": torch.zeros_like(tokens)}
                return (), inputs | labels

            units = [name for name in self.units if name in dict(model.named_modules())]
            try:
                found = rehearse(model, call, units, adapts=adapts)
                self._seen[key] = found.host_bytes, found.work
            except NotTriedError as error:
                logger.info("what training takes could not be tried, and is not planned for: %s", error)
                self._seen[key] = 0, None
        return self._seen[key]
