"""Steps on an axis of time: a row for the disk, each link and each processor, predicted or measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bigmodel.device_map.explanation import format_seconds
from bigmodel.device_map.page import LEFT, ROW, WIDTH, box, dashes, drawing, label, track
from bigmodel.device_map.simulation import Step

__all__ = ["Event", "events_of", "phase_name", "rows_of", "timetable"]

_RIGHT = 10
_TOP, _PITCH = 26, ROW + 8
_MOST_TICKS = 8
# What takes less than this is drawn so wide, to be seen and pointed at.
_LEAST_WIDTH = 0.6
# Of a letter in the drawings' type, about.
_LETTER = 6.2


@dataclass(frozen=True, slots=True)
class Event:
    """What one resource did for one unit in one pass.

    Attributes:
        row: name of the resource.
        unit: its number.
        number: of the pass.
        begin_s, end_s: seconds since the first pass began.
    """

    row: str
    unit: int
    number: int
    begin_s: float
    end_s: float


def events_of(steps: Iterable[Step]) -> Iterator[Event]:
    """All that happened in some steps."""
    for step in steps:
        if step.read is not None:
            yield Event("disk", step.unit, step.number, *step.read)
        if step.copy is not None:
            yield Event(f"link to {step.device}", step.unit, step.number, *step.copy)
        yield Event(f"runs on {step.device}", step.unit, step.number, *step.run)


def rows_of(events: Iterable[Event]) -> list[str]:
    """Names of the resources, in the order in which weights go through them."""
    return sorted({each.row for each in events}, key=lambda row: (row != "disk", not row.startswith("link"), row))


def phase_name(number: int) -> str:
    """What a pass is called."""
    return "first pass" if number == 0 else f"step {number}"


def timetable(
    events: Sequence[Event],
    rows: Sequence[str],
    end_s: float,
    colour_of: Callable[[int], str],
    told: Callable[[Event], str],
) -> str:
    """A drawing of events.

    Args:
        events: in the order in which they are drawn.
        rows: from top to bottom; also those in which nothing happened.
        end_s: where the axis ends: two drawings of one end can be compared.
        colour_of: of a unit, by its number.
        told: of an event, to who points at it.
    """
    width = WIDTH - LEFT - _RIGHT
    scale = width / max(end_s, 1e-12)
    top_of = {row: _TOP + place * _PITCH for place, row in enumerate(rows)}
    bottom = _TOP + len(rows) * _PITCH
    shapes = []
    for row, top in top_of.items():
        shapes += [label(0, top + 17, row), track(LEFT, top, width, ROW)]
    for event in events:
        begin_s = max(0.0, event.begin_s)
        wide = max((event.end_s - begin_s) * scale - 0.3, _LEAST_WIDTH)
        shapes.append(
            box(LEFT + begin_s * scale, top_of[event.row] + 3, wide, ROW - 6, colour_of(event.unit), told(event))
        )
    shapes += _tokens(events, scale, bottom)
    for tick_s in _ticks(end_s):
        shapes.append(label(LEFT + tick_s * scale, bottom + 12, format_seconds(tick_s), anchor="middle", is_soft=True))
    return drawing(shapes, bottom + 18)


def _tokens(events: Sequence[Event], scale: float, bottom: float) -> Iterator[str]:
    """Where each pass gave its token; told where there is room for it."""
    ends: dict[int, float] = {}
    for event in events:
        ends[event.number] = max(ends.get(event.number, 0.0), event.end_s)
    taken = float(LEFT)
    for number, end_s in sorted(ends.items()):
        at = LEFT + end_s * scale
        name = f"{'first token' if number == 0 else f'token {number + 1}'} {format_seconds(end_s)}"
        yield dashes(at, 20, bottom)
        length = _LETTER * len(name)
        if at - length >= taken:
            yield label(at, 14, name, anchor="end", is_soft=True)
            taken = at + _LETTER


def _ticks(end_s: float) -> Iterator[float]:
    """Round numbers of seconds, a few of them."""
    if end_s <= 0:
        return
    power = 10.0 ** math.floor(math.log10(end_s / _MOST_TICKS))
    step_s = next(step * power for step in (1, 2, 5, 10) if end_s / (step * power) <= _MOST_TICKS)
    for number in range(1, math.floor(end_s / step_s) + 1):
        yield number * step_s
