"""A plan as one self-contained page: what each tier holds, where every unit rests, and when everything happens."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from bigmodel.device_map.explanation import explain, format_seconds, holdings
from bigmodel.device_map.plan import Placement, Plan
from bigmodel.device_map.simulation import Step
from bigmodel.device_map.tables import DISK
from bigmodel.units import format_bytes

__all__ = ["draw"]

# Colours that people with any kind of sight can tell apart (Okabe and Ito, 2008).
_HOMES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7f7f7f")
_PARTS = {"weights": "#0072B2", "slots": "#E69F00", "KV": "#009E73", "activations": "#CC79A7", "other": "#9aa0a6"}
_WIDTH, _LEFT = 1080, 170
_ROW = 26
# Passes that are drawn: the first, and two steps.
_PASSES = 3

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2328; --soft: #57606a; --line: #d0d7de; --page: #ffffff; --card: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --soft: #9da7b3; --line: #30363d; --page: #0d1117; --card: #161b22; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto; max-width: 1120px;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem; }}
p.soft {{ color: var(--soft); margin: .2rem 0 1rem; }}
.figures {{ display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }}
.figures div {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; }}
.figures b {{ display: block; font-size: 1.25rem; }} .figures span {{ color: var(--soft); font-size: .85rem; }}
svg {{ width: 100%; height: auto; display: block; }} svg text {{ fill: var(--ink); font: 12px system-ui, sans-serif; }}
svg .soft {{ fill: var(--soft); }} svg .line {{ stroke: var(--line); }} svg .track {{ fill: var(--card); stroke: var(--line); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; color: var(--soft); font-size: .85rem; margin: .4rem 0; }}
.legend i {{ display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; }}
pre {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; font-size: .8rem;
  overflow-x: auto; white-space: pre-wrap; }}
</style></head><body>
<h1>{title}</h1>
<p class="soft">{subtitle}</p>
<div class="figures">{figures}</div>
<h2>Memory at the worst moment</h2>
{memory}
<h2>Where every unit rests</h2>
{units}
<h2>The first pass and {steps} steps, as predicted</h2>
{timeline}
<h2>In words</h2>
<pre>{words}</pre>
</body></html>
"""


def draw(plan: Plan, steps: Sequence[Step], title: str) -> str:
    """The page's HTML; it needs no network and no other file.

    Args:
        plan: with its estimate.
        steps: its predicted timeline, of the first pass and what follows.
        title: what is planned for.
    """
    workload, estimate = plan.workload, plan.estimate
    tokens = f"{workload.num_sequences} x ({workload.prompt_tokens} prompt + {workload.new_tokens} new) tokens"
    figures = [
        ("weights", format_bytes(plan.weight_bytes)),
        ("time to first token", _seconds(estimate.ttft_s)),
        ("time per token", _seconds(estimate.time_per_token_s)),
        ("tokens per second", f"{estimate.tokens_per_s:.3g}" if estimate.tokens_per_s else "-"),
        ("a step waits for", estimate.binds.get("decode", "-")),
    ]
    return _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(f"{tokens} on {plan.machine or 'this machine'}, rates: {plan.rates_from or 'defaults'}"),
        figures="".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in figures
        ),
        memory=_memory(plan),
        units=_units(plan),
        steps=_PASSES - 1,
        timeline=_timeline(plan, [step for step in steps if step.number < _PASSES]),
        words=html.escape(explain(plan)),
    )


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _memory(plan: Plan) -> str:
    tiers = [tier for tier in plan.estimate.peak_bytes if tier != DISK]
    shapes = []
    for row, tier in enumerate(tiers):
        peak, limit = plan.estimate.peak_bytes[tier], max(1, plan.limits.get(tier, 1))
        scale = (_WIDTH - _LEFT - 190) / max(peak, limit)
        top = 8 + row * (_ROW + 14)
        shapes.append(_text(0, top + 17, tier))
        shapes.append(f'<rect class="track" x="{_LEFT}" y="{top}" width="{limit * scale:.1f}" height="{_ROW}" rx="3"/>')
        at = float(_LEFT)
        for what, size in holdings(plan, tier):
            colour = next((colour for name, colour in _PARTS.items() if what.startswith(name)), _PARTS["other"])
            shapes.append(_box(at, top, size * scale, _ROW, colour, f"{what}: {format_bytes(size)}"))
            at += size * scale
        text = f"{format_bytes(peak)} of {format_bytes(limit)}"
        shapes.append(_text(_LEFT + max(peak, limit) * scale + 10, top + 17, text, is_soft=True))
    names = {
        "weights": "weights that stay",
        "slots": "slots for streamed weights",
        "KV": "KV cache",
        "activations": "activations",
        "other": "the rest",
    }
    return _svg(shapes, 16 + len(tiers) * (_ROW + 14)) + _legend(
        {names[part]: colour for part, colour in _PARTS.items()}
    )


def _units(plan: Plan) -> str:
    colours = _colours(plan)
    total = max(1, sum(max(place.weight_bytes, 1) for place in plan.placements))
    shapes, at = [], 0.0
    gathers = _unslotted(plan)
    for place in plan.placements:
        width = max(place.weight_bytes, 1) / total * _WIDTH
        how = "looked up row by row" if place.unit in gathers else "streams" if place.home != place.run_on else "stays"
        told = f"{place.unit}: {format_bytes(place.weight_bytes)} in {place.home}, runs on {place.run_on}, {how}"
        if place.prefill_on != place.run_on:
            told += f"; prefill on {place.prefill_on}"
        shapes.append(_box(at, 4, max(width - 0.6, 0.4), 44, colours[_kind(place)], told))
        at += width
    legend = {}
    for (home, run_on, prefill_on), colour in colours.items():
        name = f"{home} → {run_on}" if home != run_on else home
        legend[f"{name} (prefill → {prefill_on})" if prefill_on != run_on else name] = colour
    return _svg(shapes, 54) + _legend(legend)


def _timeline(plan: Plan, steps: Sequence[Step]) -> str:
    if not steps:
        return "<p class='soft'>Nothing runs.</p>"
    end = max(step.run[1] for step in steps)
    scale = (_WIDTH - _LEFT - 10) / max(end, 1e-12)
    colours = _colours(plan)
    rows: dict[str, list[tuple[tuple[float, float], Step]]] = {}
    for step in steps:
        if step.read is not None:
            rows.setdefault("disk", []).append((step.read, step))
        if step.copy is not None:
            rows.setdefault(f"link to {step.device}", []).append((step.copy, step))
        rows.setdefault(f"runs on {step.device}", []).append((step.run, step))
    order = sorted(rows, key=lambda name: (name != "disk", not name.startswith("link"), name))
    shapes = []
    for row, name in enumerate(order):
        top = 26 + row * (_ROW + 8)
        shapes.append(_text(0, top + 17, name))
        shapes.append(
            f'<rect class="track" x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT - 10}" height="{_ROW}" rx="3"/>'
        )
        for (begin, finish), step in rows[name]:
            place = plan.placements[step.unit]
            phase = "first pass" if step.number == 0 else f"step {step.number}"
            told = f"{place.unit}, {phase}: {format_seconds(begin)} to {format_seconds(finish)}"
            width = max((finish - begin) * scale - 0.3, 0.3)
            colour = colours[_kind(place)]
            shapes.append(_box(_LEFT + begin * scale, top + 3, width, _ROW - 6, colour, told))
    bottom = 26 + len(order) * (_ROW + 8)
    for number in range(_PASSES):
        own = [step for step in steps if step.number == number]
        if own:
            at = _LEFT + own[-1].run[1] * scale
            name = "first token" if number == 0 else f"token {number + 1}"
            shapes.append(
                f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{bottom}" stroke-dasharray="3 3"/>'
            )
            shapes.append(_text(at, 14, f"{name} {format_seconds(own[-1].run[1])}", anchor="end", is_soft=True))
    return _svg(shapes, bottom + 6)


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


def _svg(shapes: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(shapes)}</svg>'


def _box(x: float, y: float, width: float, height: float, colour: str, told: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height}" fill="{colour}">'
        f"<title>{html.escape(told)}</title></rect>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", is_soft: bool = False) -> str:
    kind = ' class="soft"' if is_soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'


def _legend(colours: Mapping[str, str]) -> str:
    items = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in colours.items()
    )
    return f'<div class="legend">{items}</div>'
