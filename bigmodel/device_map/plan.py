"""The nouns of planning: what is asked for (Workload), what is decided (Plan), what is expected (Estimate)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bigmodel.errors import InvalidArgumentError
from bigmodel.units import format_bytes

__all__ = ["Estimate", "Placement", "Plan", "SlotGroup", "Workload"]

_VERSION = 1


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
        fingerprint: of the checkpoint; empty for a plan of a module alone.
        notes: what a reader should know, such as units that stay although the map sends them to disk.
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
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes that are fetched for each pass (rows that are looked up where they rest are not)."""
        streamed = {name for group in self.slots for name in group.units}
        return sum(placement.weight_bytes for placement in self.placements if placement.unit in streamed)

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

    def explain(self) -> str:
        """A table that a person reads in ten seconds: what each tier holds against its limit, and what streams."""
        slot_bytes = sum(group.num_slots * group.slot_bytes for group in self.slots)
        peak, limit = self.estimate.peak_bytes["cpu"], self.limits["cpu"]
        parts = [
            ("weights that stay", self.resident_bytes),
            (f"slots for streamed weights ({sum(group.num_slots for group in self.slots)})", slot_bytes),
            ("read buffers", self.staging_bytes),
            (f"KV cache ({self.workload.batch_size} x {self.workload.total_tokens} tokens)", self.kv_bytes),
            ("activations", self.activation_bytes),
            ("buffers", self.buffer_bytes),
            ("reserve", self.reserve_bytes),
        ]
        lines = [f"cpu    peak {format_bytes(peak)} of {format_bytes(limit)}"]
        lines += [f"         {format_bytes(size):>10}  {what}" for what, size in parts if size]
        written = self.estimate.peak_bytes.get("disk", 0)
        if written:
            lines.append(
                f"disk   {format_bytes(written)} written once (converted weights), of {format_bytes(self.limits['disk'])}"
            )
        total = self.weight_bytes
        for home, what in (("cpu", "rest in host memory"), ("disk", "rest in the checkpoint's files")):
            here = [placement for placement in self.placements if placement.home == home]
            if here:
                size = format_bytes(sum(placement.weight_bytes for placement in here))
                names = _collapsed([placement.unit for placement in here])
                lines.append(f"{len(here)} units, {size} of {format_bytes(total)}, {what}: {names}")
        if self.slots:
            lines.append(f"each pass streams {format_bytes(self.streamed_bytes)} from disk")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as text; `from_json` reads it back equal."""
        return json.dumps({"version": _VERSION} | asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            InvalidArgumentError: the text is no plan, or of another version.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.pop("version")
            if version != _VERSION:
                raise InvalidArgumentError(
                    f"The plan has version {version}, and version {_VERSION} is read. Make it again."
                )
            fields["placements"] = tuple(
                Placement(**each | {"parameters": tuple(each["parameters"])}) for each in fields["placements"]
            )
            fields["slots"] = tuple(SlotGroup(**each | {"units": tuple(each["units"])}) for each in fields["slots"])
            fields["workload"] = Workload(**fields["workload"])
            fields["estimate"] = Estimate(**fields["estimate"])
            fields["notes"] = tuple(fields["notes"])
            plan = cls(**fields)
            plan._refuse_nonsense()
            return plan
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidArgumentError):
                raise
            raise InvalidArgumentError(
                f"The text is not a plan ({type(error).__name__}: {error}). Write one with to_json()."
            ) from error

    def _refuse_nonsense(self) -> None:
        """TypeError or ValueError where a text had the fields of a plan and not their meaning."""
        if not isinstance(self.fingerprint, str):
            raise TypeError(f"fingerprint is {self.fingerprint!r}")
        names = [placement.unit for placement in self.placements]
        for placement in self.placements:
            texts = (placement.unit, placement.home, placement.run_on, placement.prefill_on, *placement.parameters)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"the placement of {placement.unit!r} has something that is no text")
        if len(set(names)) < len(names):
            raise ValueError("a unit is placed twice")
        for tier, limit in self.limits.items():
            if not isinstance(tier, str) or not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
                raise ValueError(f"the limit of {tier!r} is {limit!r}")


def _collapsed(names: Sequence[str]) -> str:
    """Names with runs of numbers folded: ``model.layers.[0-3,5].mlp``."""
    folded: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.search(r"(?:(?<=\.)|^)\d+(?=\.|$| )", name)
        before, number, after = (
            (name[: match.start()], int(match.group()), name[match.end() :]) if match else (name, -1, "")
        )
        folded.setdefault((before, after), []).append(number)
    return ", ".join(
        f"{before}[{_runs(numbers)}]{after}" if numbers != [-1] else before
        for (before, after), numbers in folded.items()
    )


def _runs(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
