"""The nouns of planning: what is asked for (Workload), what is decided (Plan), what is expected (Estimate)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bigmodel.errors import InvalidArgumentError

__all__ = ["Estimate", "Placement", "Plan", "SlotGroup", "Workload"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the budget must hold and the plan is made for.

    Attributes:
        batch_size: sequences per pass.
        prompt_tokens: tokens of the first pass, per sequence.
        new_tokens: tokens generated after it, per sequence; the KV cache is sized for prompt + new tokens.
    """

    batch_size: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            low = 0 if name == "new_tokens" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InvalidArgumentError(f"Workload.{name} is {value!r}. Give an int >= {low}.")

    @property
    def total_tokens(self) -> int:
        """Tokens that the KV cache holds at the end, per sequence."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one unit's weights rest and what computes it.

    Attributes:
        unit: the unit's name (a module's fully qualified name, or a parameter's where a unit is one tied parameter).
        home: ``"cpu"``, ``"disk"`` or an accelerator such as ``"cuda:0"``.
        run_on: the device of a decode step.
        prefill_on: the device of a prefill pass.
        weight_bytes: bytes in the dtype they have in the model.
    """

    unit: str
    home: str
    run_on: str
    prefill_on: str
    weight_bytes: int

    @property
    def is_streamed(self) -> bool:
        return self.home != self.run_on


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Equal buffers on one device into which the named units are fetched in turn.

    Attributes:
        device: where the slots are.
        num_slots: how many.
        slot_bytes: bytes of each, alignment included.
        units: the streamed units that take turns in them.
    """

    device: str
    num_slots: int
    slot_bytes: int
    units: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is expected of a plan. Times are None until a plan is made from measured rates.

    Attributes:
        peak_bytes: tier -> bytes at the worst moment, loading included, counted as `max_memory` counts.
        baseline_bytes: what the interpreter and its libraries hold in host memory, outside the budget.
        load_s, ttft_s, time_per_token_s, tokens_per_s: predicted seconds and rate.
        binds: phase -> the resource that limits it.
    """

    peak_bytes: Mapping[str, int]
    baseline_bytes: int = 0
    load_s: float | None = None
    ttft_s: float | None = None
    time_per_token_s: float | None = None
    tokens_per_s: float | None = None
    binds: Mapping[str, str] = field(default_factory=dict)
