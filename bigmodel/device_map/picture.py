"""A plan as one self-contained page: what each tier holds, where every unit rests, and when everything happens; or happened."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from bigmodel.device_map.explanation import explain, format_seconds, holdings
from bigmodel.device_map.page import LEFT, ROW, WIDTH, box, drawing, label, legend_of, page_of, table_of, track
from bigmodel.device_map.plan import Placement, Plan
from bigmodel.device_map.simulation import Step
from bigmodel.device_map.tables import DISK
from bigmodel.device_map.timetable import Event, events_of, phase_name, rows_of, timetable
from bigmodel.units import format_bytes

__all__ = ["draw", "draw_measured"]

# Colours that people with any kind of sight can tell apart (Okabe and Ito, 2008).
_HOMES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7f7f7f")
_PARTS = {"weights": "#0072B2", "slots": "#E69F00", "KV": "#009E73", "activations": "#CC79A7", "other": "#9aa0a6"}
_PASSES, _PASSES_DRAWN = 3, "The first pass and 2 steps"


def draw(plan: Plan, steps: Sequence[Step], title: str) -> str:
    """The page's HTML; it needs no network and no other file.

    Args:
        plan: with its estimate.
        steps: its predicted timeline, of the first pass and what follows.
        title: what is planned for.
    """
    estimate = plan.estimate
    figures = {
        "weights": format_bytes(plan.weight_bytes),
        "time to first token": _seconds(estimate.ttft_s),
        "time per token": _seconds(estimate.time_per_token_s),
        "tokens per second": f"{estimate.tokens_per_s:.3g}" if estimate.tokens_per_s else "-",
        "a step waits for": estimate.binds.get("decode", "-"),
    }
    cards = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in figures.items()
    )
    events = _first_events(steps)

    def told(event: Event) -> str:
        return f"{_name(plan, event)}: {format_seconds(event.begin_s)} to {format_seconds(event.end_s)}"

    return page_of(
        title,
        _subtitle(plan),
        f'<div class="figures">{cards}</div>',
        {
            "Memory at the worst moment": _memory(plan),
            "Where every unit rests": _units(plan),
            f"{_PASSES_DRAWN}, as predicted": _timeline(plan, events, rows_of(events), _end_s(events), told),
            "In words": f"<pre>{html.escape(explain(plan))}</pre>",
        },
    )


def draw_measured(
    plan: Plan,
    predicted_steps: Sequence[Step],
    measured_steps: Sequence[Step],
    figures: Sequence[tuple[str, str, str, str]],
    title: str,
    told: Sequence[str] = (),
) -> str:
    """The page's HTML of what really happened above what was predicted, on one scale of time.

    Args:
        plan: that was carried out.
        predicted_steps, measured_steps: timelines of its first pass and what follows.
        figures: of each its name, and as text what was measured, what was predicted, and what bounds it.
        title: what was run.
        told: what a reader of the figures must know, a paragraph each.
    """
    measured, predicted = _first_events(measured_steps), _first_events(predicted_steps)
    both = [*measured, *predicted]
    rows, end_s = rows_of(both), _end_s(both)
    return page_of(
        title,
        _subtitle(plan),
        table_of(("", "measured", "predicted", "bound"), figures)
        + "".join(f'\n<p class="soft">{html.escape(line)}</p>' for line in told),
        {
            f"{_PASSES_DRAWN}, as measured": _timeline(
                plan, measured, rows, end_s, _comparing(plan, "measured", "predicted", predicted)
            ),
            f"{_PASSES_DRAWN}, as predicted, on the same scale of time": _timeline(
                plan, predicted, rows, end_s, _comparing(plan, "predicted", "measured", measured)
            ),
            "Where every unit rests": _units(plan),
        },
    )


def _subtitle(plan: Plan) -> str:
    workload = plan.workload
    tokens = f"{workload.num_sequences} x ({workload.prompt_tokens} prompt + {workload.new_tokens} new) tokens"
    return f"{tokens} on {plan.machine or 'this machine'}, rates: {plan.rates_from or 'defaults'}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _memory(plan: Plan) -> str:
    tiers = [tier for tier in plan.estimate.peak_bytes if tier != DISK]
    shapes = []
    for row, tier in enumerate(tiers):
        peak, limit = plan.estimate.peak_bytes[tier], max(1, plan.limits.get(tier, 1))
        scale = (WIDTH - LEFT - 190) / max(peak, limit)
        top = 8 + row * (ROW + 14)
        shapes.append(label(0, top + 17, tier))
        shapes.append(track(LEFT, top, limit * scale, ROW))
        at = float(LEFT)
        for what, size in holdings(plan, tier):
            colour = next((colour for name, colour in _PARTS.items() if what.startswith(name)), _PARTS["other"])
            shapes.append(box(at, top, size * scale, ROW, colour, f"{what}: {format_bytes(size)}"))
            at += size * scale
        told = f"{format_bytes(peak)} of {format_bytes(limit)}"
        shapes.append(label(LEFT + max(peak, limit) * scale + 10, top + 17, told, is_soft=True))
    names = {
        "weights": "weights that stay",
        "slots": "slots for streamed weights",
        "KV": "KV cache",
        "activations": "activations",
        "other": "the rest",
    }
    return drawing(shapes, 16 + len(tiers) * (ROW + 14)) + legend_of(
        {names[part]: colour for part, colour in _PARTS.items()}
    )


def _units(plan: Plan) -> str:
    colours = _colours(plan)
    total = max(1, sum(max(place.weight_bytes, 1) for place in plan.placements))
    shapes, at = [], 0.0
    gathers = _unslotted(plan)
    for place in plan.placements:
        width = max(place.weight_bytes, 1) / total * WIDTH
        how = "looked up row by row" if place.unit in gathers else "streams" if place.home != place.run_on else "stays"
        told = f"{place.unit}: {format_bytes(place.weight_bytes)} in {place.home}, runs on {place.run_on}, {how}"
        if place.prefill_on != place.run_on:
            told += f"; prefill on {place.prefill_on}"
        shapes.append(box(at, 4, max(width - 0.6, 0.4), 44, colours[_kind(place)], told))
        at += width
    names = {}
    for (home, run_on, prefill_on), colour in colours.items():
        name = f"{home} → {run_on}" if home != run_on else home
        names[f"{name} (prefill → {prefill_on})" if prefill_on != run_on else name] = colour
    return drawing(shapes, 54) + legend_of(names)


def _timeline(
    plan: Plan, events: Sequence[Event], rows: Sequence[str], end_s: float, told: Callable[[Event], str]
) -> str:
    if not events:
        return "<p class='soft'>Nothing runs.</p>"
    colours = _colours(plan)
    return timetable(events, rows, end_s, lambda unit: colours[_kind(plan.placements[unit])], told)


def _first_events(steps: Sequence[Step]) -> list[Event]:
    """Of the passes that are drawn."""
    return list(events_of(step for step in steps if step.number < _PASSES))


def _end_s(events: Sequence[Event]) -> float:
    return max((event.end_s for event in events), default=0.0)


def _name(plan: Plan, event: Event) -> str:
    return f"{plan.placements[event.unit].unit}, {phase_name(event.number)}"


def _comparing(plan: Plan, own: str, other: str, others: Sequence[Event]) -> Callable[[Event], str]:
    """What an event tells of itself, and of what the other timeline has in its place."""
    spans: dict[tuple[str, int, int], tuple[float, float]] = {}
    for each in others:
        key = each.row, each.unit, each.number
        begin_s, end_s = spans.get(key, (each.begin_s, each.end_s))
        spans[key] = min(begin_s, each.begin_s), max(end_s, each.end_s)

    def told(event: Event) -> str:
        span = spans.get((event.row, event.unit, event.number))
        beside = _span(*span) if span is not None else "not at all"
        return f"{_name(plan, event)}: {own} {_span(event.begin_s, event.end_s)}; {other} {beside}"

    return told


def _span(begin_s: float, end_s: float) -> str:
    return f"{format_seconds(begin_s)} to {format_seconds(end_s)} ({format_seconds(end_s - begin_s)})"


def _kind(place: Placement) -> tuple[str, str, str]:
    return place.home, place.run_on, place.prefill_on


def _colours(plan: Plan) -> dict[tuple[str, str, str], str]:
    """A colour for each way of resting and running, in the order in which they come."""
    kinds = dict.fromkeys(map(_kind, plan.placements))
    return {kind: _HOMES[number % len(_HOMES)] for number, kind in enumerate(kinds)}


def _unslotted(plan: Plan) -> set[str]:
    """Units that rest away from where they run, and have no slot: tables."""
    slotted = {name for group in plan.slots for name in group.units}

    def is_away(place: Placement) -> bool:
        return place.home != place.run_on and place.unit not in slotted

    return {place.unit for place in plan.placements if is_away(place)}
