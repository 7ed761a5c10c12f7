"""When tokens come, and which; imported by every run, so it takes no large library along."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Clock", "criteria", "first_difference", "greedy_options", "stated"]


class Clock:
    """When each token came.

    Args:
        note: called with each; what it gives is kept.

    Attributes:
        started_s: when the generation began.
        times: of each token, by the same clock.
        tokens: of the first sequence.
        notes: one for each token.
    """

    def __init__(self, note: Any = None) -> None:
        self.started_s = math.nan
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.notes: list[Any] = []
        self._note = note

    def start(self) -> None:
        """Now."""
        self.started_s = time.perf_counter()

    def tick(self, token: int) -> None:
        """A token is in the host's hands."""
        self.times.append(time.perf_counter())
        self.tokens.append(token)
        if self._note is not None:
            self.notes.append(self._note())

    def steps(self) -> list[float]:
        """Seconds of each step but the first."""
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]


def criteria(on_token: Callable[[int], None]) -> Any:
    """What ``generate(stopping_criteria=)`` calls after each step: `on_token` hears of the first sequence's. It stops nothing."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Ticks(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            on_token(int(input_ids[0, -1]))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Ticks()])


def greedy_options(num_tokens: int) -> dict[str, Any]:
    """What ``generate`` is asked for, whatever the checkpoint's own defaults are: exactly so many tokens, the likeliest ones."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
    options |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return options | {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two sequences of tokens differ; None where they do not."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def stated(limits: Mapping[str, int] | None) -> dict[int | str, int] | None:
    """`max_memory`, as it was before JSON made names of indices."""
    return {int(tier) if tier.isdigit() else tier: size for tier, size in limits.items()} if limits else None
