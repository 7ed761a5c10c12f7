"""The figures that have a target, of every result file, as the section "Results" of this folder's README.

``python -m benchmarks.overview``, after a result file was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["overview"]

FOLDER = Path(__file__).parent
HEADING = "## Results"
INTRODUCTION = (
    "Every figure that has a target, as `python -m benchmarks.overview` finds them in the result files.\n"
    "These hold the others too, and hardware, versions and configuration."
)
COLUMNS = "| figure | target | min | median | max | verdict |\n|---|---|---|---|---|---|\n"
_TITLE = re.compile(r"# (.+), (\d{4}-\d\d-\d\d)")


def overview(folder: Path) -> str:
    """Markdown: for each result file of a folder its date, its name and its figures."""
    parts = []
    for file in sorted(folder.glob("*.md")):
        lines = file.read_text(encoding="utf-8").splitlines()
        title = _TITLE.match(lines[0]) if lines else None
        rows = list(_rows(lines))
        if title is None or not rows:
            continue
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
        parts.append(f"**[{title[1]}](results/{file.name})**, {title[2]}\n\n{COLUMNS}{table}")
    return "\n".join(parts)


def _rows(lines: list[str]) -> Iterator[list[str]]:
    """figure, target, min, median, max, verdict."""
    for line in lines:
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) >= 6 and cells[1].startswith((">=", "<=")):
            yield cells[:6]


def main() -> None:
    page = FOLDER / "README.md"
    text = page.read_text(encoding="utf-8")
    before, _, after = text.partition(f"{HEADING}\n")
    rest = after.partition("\n## ")[2]
    page.write_text(
        f"{before}{HEADING}\n\n{INTRODUCTION}\n\n{overview(FOLDER / 'results')}" + (f"\n## {rest}" if rest else ""),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
