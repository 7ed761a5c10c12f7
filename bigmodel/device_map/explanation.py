"""A plan in words: a table that a person reads in ten seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bigmodel.units import format_bytes

if TYPE_CHECKING:
    from bigmodel.device_map.plan import Plan

__all__ = ["collapsed", "explain", "format_seconds", "holdings"]

DEFAULT_RATES_NOTE = (
    "the times are guesses: nobody measured this machine with this torch. "
    "`bigmodel calibrate FOLDER` does, once, in about half a minute"
)


def explain(plan: Plan) -> str:
    """What each tier holds against its limit, what rests and runs where, how long it takes, what binds, what would help."""
    lines = [line for tier in plan.estimate.peak_bytes for line in _tier(plan, tier)]
    total = format_bytes(plan.weight_bytes)
    rests: dict[tuple[str, str, str], list[str]] = {}
    sizes: dict[tuple[str, str, str], int] = {}
    for place in plan.placements:
        key = (place.home, place.run_on, place.prefill_on)
        rests.setdefault(key, []).append(place.unit)
        sizes[key] = sizes.get(key, 0) + place.weight_bytes
    is_on_host = plan.run_devices <= {"cpu"}
    for (home, run_on, prefill_on), names in rests.items():
        where = {"cpu": "host memory", "disk": "the checkpoint's files"}.get(home, home)
        runs = "" if is_on_host or run_on == prefill_on == home else f" and run on {run_on}"
        if prefill_on != run_on:
            runs += f", from {plan.prefill_from_tokens} tokens a pass on {prefill_on}"
        size = format_bytes(sizes[home, run_on, prefill_on])
        lines.append(f"{len(names)} units, {size} of {total}, rest in {where}{runs}: {collapsed(names)}")
    for tier, name in (("disk", "disk"), ("cpu", "host memory")):
        in_step, in_prefill = plan.streamed_bytes_from(tier), plan.streamed_bytes_from(tier, in_prefill=True)
        if in_step:
            lines.append(f"each pass streams {format_bytes(in_step)} from {name}")
        if in_prefill > in_step:
            lines.append(f"the first pass streams {format_bytes(in_prefill - in_step)} more from {name}")
    return "\n".join([*lines, *_times(plan), *(f"note: {note}" for note in plan.notes)])


def _tier(plan: Plan, tier: str) -> list[str]:
    peak, limit = plan.estimate.peak_bytes[tier], plan.limits.get(tier, 0)
    if tier == "disk":
        text = f"disk   {format_bytes(peak)} written once (converted weights), of {format_bytes(limit)}"
        return [text] if peak else []
    phases = [
        f"{name} {format_bytes(sizes[tier])}"
        for phase, name in (("load", "load"), ("prefill", "first pass"), ("decode", "steps"))
        if tier in (sizes := plan.estimate.phase_peak_bytes.get(phase, {}))
    ]
    by_phase = f" ({', '.join(phases)})" if phases else ""
    lines = [f"{tier:<6} peak {format_bytes(peak)} of {format_bytes(limit)}{by_phase}"]
    return lines + [f"         {format_bytes(size):>10}  {what}" for what, size in holdings(plan, tier) if size]


def holdings(plan: Plan, tier: str) -> list[tuple[str, int]]:
    """What a tier holds at its peak: (what, bytes), which add up to it."""
    peak = plan.estimate.peak_bytes[tier]
    if tier == "disk":
        return [("converted weights", peak)]
    groups = [group for group in plan.slots if group.device == tier]
    slots = (
        f"slots for streamed weights ({sum(group.num_slots for group in groups)})",
        sum(group.num_slots * group.slot_bytes for group in groups),
    )
    if tier != "cpu":
        weights = sum(place.weight_bytes for place in plan.placements if place.home == tier)
        rest = max(0, peak - weights - slots[1])
        return [("weights that stay", weights), slots, ("cache, activations, buffers and reserve", rest)]
    # Cache and activations are where units run, of which the host may run all, some or none: they are what is left.
    known = plan.resident_bytes + slots[1] + plan.staging_bytes + plan.buffer_bytes + plan.reserve_bytes
    rest = max(0, peak - known)
    ring = min(rest, plan.ring_bytes)
    activations = min(rest - ring, plan.activation_bytes)
    workload = plan.workload
    tokens = f"{workload.num_sequences} x {workload.total_tokens} tokens"
    if plan.run_devices <= {"cpu"}:
        running = [(f"KV cache ({tokens})", rest - ring - activations), ("activations", activations)]
    else:
        running = [("KV cache and activations of what runs here", rest - ring)]
    return [
        ("weights that stay", plan.resident_bytes),
        slots,
        ("host buffers on the way to accelerators", ring),
        ("read buffers", plan.staging_bytes),
        *running,
        ("buffers", plan.buffer_bytes),
        ("reserve", plan.reserve_bytes),
    ]


def _times(plan: Plan) -> list[str]:
    estimate = plan.estimate
    if estimate.ttft_s is None or estimate.time_per_token_s is None or not plan.placements:
        return []
    text = (
        f"predicted on {plan.machine} (rates: {plan.rates_from}): first token after {format_seconds(estimate.ttft_s)}"
    )
    if estimate.tokens_per_s is not None:
        text += f", then {format_seconds(estimate.time_per_token_s)} per token, {_rate(estimate.tokens_per_s)} tokens/s"
    if estimate.load_s is not None:
        text += f"; weights load in {format_seconds(estimate.load_s)}"
    lines = [text]
    if estimate.train_step_s is not None:
        streamed = sum(plan.streamed_bytes_from(tier, in_prefill=True) for tier in ("disk", "cpu"))
        fetched = f", for which {format_bytes(streamed)} are fetched twice" if streamed else ""
        tokens = f"{plan.workload.num_sequences} x {plan.workload.prompt_tokens} tokens"
        lines.append(f"a pass of {tokens} with its backward takes {format_seconds(estimate.train_step_s)}{fetched}")
    if estimate.binds:
        bound = "; ".join(f"{phase}: {resource}" for phase, resource in estimate.binds.items())
        lines.append(f"what binds: {bound}")
    whole = estimate.ttft_s + plan.workload.num_steps * estimate.time_per_token_s
    tiers_of: dict[float, list[str]] = {}  # what gains the same is told once
    for tier, gain in plan.gains_s.items():
        tiers_of.setdefault(gain, []).append(tier)
    for gain, tiers in tiers_of.items():
        share = gain / whole if whole else 0.0
        less = f"{format_seconds(gain)} less of {format_seconds(whole)} ({share:.1%})" if gain else "gains nothing"
        lines.append(f"one more GB of {' or '.join(tiers)}: {less}")
    for other in plan.alternatives:
        slower = other.seconds / whole - 1 if whole else 0.0
        lines.append(f"runner-up: {other.what}: {format_seconds(other.seconds)} (+{slower:.1%})")
    if plan.rates_from == "defaults":
        lines.append(f"note: {DEFAULT_RATES_NOTE}")
    return lines


def format_seconds(seconds: float) -> str:
    """As people read it: ``12.3 ms``, ``1.24 s``, ``3.5 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2g} us"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def _rate(per_s: float) -> str:
    return f"{per_s:.3g}"


def collapsed(names: Sequence[str]) -> str:
    """Names with runs of numbers folded: ``model.layers.[0-3,5].mlp``."""
    folded: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.search(r"(?:(?<=\.)|^)\d{1,9}(?=\.|$| )", name)
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
