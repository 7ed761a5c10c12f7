"""A page that is whole by itself, for light and for dark rooms: its style, and the shapes that are drawn on it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

__all__ = ["LEFT", "ROW", "WIDTH", "box", "dashes", "drawing", "label", "legend_of", "page_of", "table_of", "track"]

# Of drawings, in their own units: how wide, where rows begin behind their names, how high a row is.
WIDTH, LEFT, ROW = 1080, 170, 26

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
svg {{ width: 100%; height: auto; display: block; overflow: visible; }}
svg text {{ fill: var(--ink); font: 12px system-ui, sans-serif; }}
svg .soft {{ fill: var(--soft); }} svg .line {{ stroke: var(--line); }} svg .track {{ fill: var(--card); stroke: var(--line); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; color: var(--soft); font-size: .85rem; margin: .4rem 0; }}
.legend i {{ display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; }}
pre {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; font-size: .8rem;
  overflow-x: auto; white-space: pre-wrap; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem 0 .25rem 2rem; border-bottom: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: normal; }} th:first-child {{ text-align: left; padding-left: 0; color: var(--ink); }}
</style></head><body>
<h1>{title}</h1>
<p class="soft">{subtitle}</p>
{body}
</body></html>
"""


def page_of(title: str, subtitle: str, opening: str, parts: Mapping[str, str]) -> str:
    """The page's HTML; it needs no network and no other file.

    Args:
        title, subtitle: as text.
        opening: HTML of what comes first.
        parts: heading, as text -> HTML of what stands below it.
    """
    body = [opening, *(f"<h2>{html.escape(heading)}</h2>\n{part}" for heading, part in parts.items())]
    return _PAGE.format(title=html.escape(title), subtitle=html.escape(subtitle), body="\n".join(body))


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; the first of each row is its name."""
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    ]
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def drawing(shapes: Sequence[str], height: float) -> str:
    """A drawing."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(shapes)}</svg>'


def box(x: float, y: float, width: float, height: float, colour: str, told: str) -> str:
    """A rectangle that tells something to who points at it."""
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height}" fill="{colour}">'
        f"<title>{html.escape(told)}</title></rect>"
    )


def track(x: float, y: float, width: float, height: float) -> str:
    """What boxes stand on."""
    return f'<rect class="track" x="{x}" y="{y}" width="{width:.1f}" height="{height}" rx="3"/>'


def dashes(x: float, top: float, bottom: float) -> str:
    """A dashed line from top to bottom."""
    return f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke-dasharray="3 3"/>'


def label(x: float, y: float, words: str, *, anchor: str = "start", is_soft: bool = False) -> str:
    """Words at a place."""
    kind = ' class="soft"' if is_soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(words)}</text>'


def legend_of(colours: Mapping[str, str]) -> str:
    """What colours mean: name -> colour."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in colours.items()
    )
    return f'<div class="legend">{items}</div>'
