"""The nouns of planning: what is asked for (Workload), what is decided (Plan), what is expected (Estimate)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bigmodel.checks import parse_json
from bigmodel.device_map.explanation import explain
from bigmodel.device_map.plan_fields import check_plan
from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.units import MOST

if TYPE_CHECKING:
    from bigmodel.device_map.machine import Machine

__all__ = ["MAX_SLOTS", "Alternative", "Estimate", "Placement", "Plan", "SlotGroup", "Workload"]

_VERSION = 2


MAX_SLOTS = 3
"""Of a lane: one is computed with, one is ready, one is being filled."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the budget must hold and the plan is made for.

    Attributes:
        batch_size: sequences per pass; "auto" is the number that generates the most tokens per second and fits.
        prompt_tokens: tokens of the first pass, per sequence.
        new_tokens: tokens generated after it, per sequence; the KV cache is sized for prompt + new tokens.
        trains: whether passes of so many prompt tokens are recorded too, to train adapters: what they and their backward hold is
            kept free, with adapters on all products, and all blocks checkpointed.
    """

    batch_size: int | str = 1
    prompt_tokens: int = 512
    new_tokens: int = 128
    trains: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            if name == "batch_size" and value == "auto":
                continue
            low = 0 if name == "new_tokens" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST:
                raise InvalidArgumentError(f"Workload.{name} is {shown(value)}. Give an int from {low} to {MOST}.")

        if not isinstance(self.trains, bool):
            raise InvalidArgumentError(f"Workload.trains is {shown(self.trains)}. Give True or False.")

    @property
    def num_sequences(self) -> int:
        """`batch_size`, where it is a number.

        Raises:
            InvalidArgumentError: it is "auto", and nobody has chosen one yet.
        """
        if isinstance(self.batch_size, str):
            raise InvalidArgumentError("The batch size is 'auto'; bigmodel.make_plan chooses one. Give a number here.")
        return self.batch_size

    @property
    def num_steps(self) -> int:
        """Passes after the first one, which gives a token too."""
        return max(0, self.new_tokens - 1)

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
        parameters: first names of its parameters, where a map divides the unit; empty where it is whole.
    """

    unit: str
    home: str
    run_on: str
    prefill_on: str
    weight_bytes: int
    parameters: tuple[str, ...] = ()


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
    """What is expected of a plan.

    Attributes:
        peak_bytes: tier -> bytes at the worst moment, loading included, counted as `max_memory` counts.
        phase_peak_bytes: phase ("load", "prefill", "decode") -> tier -> bytes at its worst moment; slots are in all of them.
        baseline_bytes: what the interpreter and its libraries hold in host memory, outside the budget.
        load_s: seconds that reading what stays takes, at least.
        ttft_s: seconds of the workload's first pass, from a model that was just loaded.
        time_per_token_s: of a step in the middle of what is generated, for all sequences.
        tokens_per_s: of all sequences, while they are generated.
        binds: phase ("prefill", "decode") -> the resource that works longest in it.
        pass_s: tokens of each sequence -> seconds of a pass in the middle of what is generated that takes so many at once,
            as where guessed tokens are checked.
        least_s: phase -> resource -> seconds that it needs at least for one pass, whatever the order: bytes or FLOPs over its
            rate. The first pass, from empty slots, or a steady step. Resources are "disk", "link to cuda:0", "memory of cpu" and
            "arithmetic of cpu"; those of one device count apart. The largest is what the phase cannot fall below.
        bytes_per_s: resource -> the rate that was reckoned with; not of arithmetic.
        train_step_s: of a workload that trains: seconds of a pass of the prompt that is recorded, and its backward, without the
            optimizer's step.
    """

    peak_bytes: Mapping[str, int]
    baseline_bytes: int = 0
    load_s: float | None = None
    ttft_s: float | None = None
    time_per_token_s: float | None = None
    tokens_per_s: float | None = None
    binds: Mapping[str, str] = field(default_factory=dict)
    phase_peak_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    pass_s: Mapping[int, float] = field(default_factory=dict)
    least_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    train_step_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A map that was not chosen.

    Attributes:
        what: how it differs.
        seconds: that the workload would take.
    """

    what: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every weight rests and where every unit runs; carrying it out is somebody else's job.

    Attributes:
        placements: one for each unit, in order of definition.
        slots: the buffers that streamed units take turns in.
        workload: what it was made for.
        limits: tier -> bytes that it may use.
        resident_bytes: host memory of the weights that stay.
        buffer_bytes: of the model's buffers.
        staging_bytes: of the buffers that reads go through where bytes cannot go straight into place.
        kv_bytes: of the cache at the workload's last token.
        activation_bytes: the largest that a pass of the workload holds beside it.
        reserve_bytes: for what no formula sees: threads, the allocator's holes, the interpreter's growth.
        estimate: what is expected of it.
        machine: name of the one that it is for.
        rates_from: where that machine's rates come from.
        fingerprint: of the checkpoint; empty for a plan of a module alone.
        notes: what a reader should know, such as units that stay although the map sends them to disk.
        alternatives: the next best maps.
        gains_s: tier -> seconds that the workload would take less with one more GB of it.
        ring_bytes: of the host's buffers on the way to accelerators.
        prefill_from_tokens: a pass of at least so many tokens, in all its sequences, runs where `prefill_on` says, a shorter one
            where `run_on` does; 0 where both say the same of every unit.
    """

    placements: tuple[Placement, ...]
    slots: tuple[SlotGroup, ...]
    workload: Workload
    limits: Mapping[str, int]
    resident_bytes: int
    buffer_bytes: int
    staging_bytes: int
    kv_bytes: int
    activation_bytes: int
    reserve_bytes: int
    estimate: Estimate
    machine: str = ""
    rates_from: str = ""
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    gains_s: Mapping[str, float] = field(default_factory=dict)
    ring_bytes: int = 0
    prefill_from_tokens: int = 0

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes that are fetched for each decode step (rows that are looked up where they rest are not)."""
        return sum(map(self.streamed_bytes_from, {place.home for place in self.placements}))

    def streamed_bytes_from(self, tier: str, *, in_prefill: bool = False) -> int:
        """Those of them that rest in a tier; in a decode step, or in a prefill pass."""
        has_slot = {name for group in self.slots for name in group.units}
        return sum(
            place.weight_bytes
            for place in self.placements
            if place.unit in has_slot and place.home == tier != (place.prefill_on if in_prefill else place.run_on)
        )

    @property
    def run_devices(self) -> set[str]:
        """All devices that run something, in any pass."""
        return {device for place in self.placements for device in (place.run_on, place.prefill_on)}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(placement.weight_bytes for placement in self.placements)

    def home_of(self, unit: str) -> str:
        """The tier where a unit rests.

        Raises:
            KeyError: there is no such unit.
        """
        return {placement.unit: placement.home for placement in self.placements}[unit]

    @classmethod
    def from_device_map(
        cls,
        device_map: Mapping[str, Any],
        path_or_model: Any,
        machine: Machine | None = None,
        workload: Workload | None = None,
    ) -> Plan:
        """What a map in Accelerate's grammar comes to: `make_plan` with this map, its peaks and its predicted times.

        Args:
            device_map: module or parameter names -> tiers.
            path_or_model, machine, workload: as in `make_plan`.

        Raises:
            As `make_plan`.
        """
        import bigmodel  # its public door; a plan knows nothing of checkpoints

        return bigmodel.make_plan(path_or_model, machine, workload, device_map=device_map)

    def explain(self) -> str:
        """A table that a person reads in ten seconds: what each tier holds against its limit, what streams, how long it takes."""
        return explain(self)

    def to_json(self) -> str:
        """The plan as text; `from_json` reads it back equal."""
        return json.dumps({"version": _VERSION} | asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            InvalidArgumentError: the text is no plan, or of another version.
        """
        fields: Any = parse_json(text, "The text of the plan")
        version = fields.pop("version", None) if isinstance(fields, dict) else None
        if version != _VERSION or isinstance(version, bool):
            raise InvalidArgumentError(
                f"The text is no plan of version {_VERSION}: its version is {shown(version)}. Make it again with make_plan."
            )
        try:
            check_plan(fields)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"The text is not a plan: {str(error).rstrip('.')}. Write one with to_json()."
            ) from None
        fields["placements"] = tuple(
            Placement(**each | {"parameters": tuple(each["parameters"])}) for each in fields["placements"]
        )
        fields["slots"] = tuple(SlotGroup(**each | {"units": tuple(each["units"])}) for each in fields["slots"])
        fields["workload"] = Workload(**fields["workload"])
        pass_s = {int(tokens): seconds for tokens, seconds in fields["estimate"].get("pass_s", {}).items()}
        fields["estimate"] = Estimate(**fields["estimate"] | {"pass_s": pass_s})
        fields["notes"] = tuple(fields.get("notes", ()))
        fields["alternatives"] = tuple(Alternative(**each) for each in fields.get("alternatives", ()))
        return cls(**fields)
