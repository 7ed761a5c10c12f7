"""A line at the bottom of the terminal that says how a run goes, while its text is written above."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

__all__ = ["bottom_line"]

_EVERY_S = 0.5
# Smaller terminals have no row to spare.
_LEAST_ROWS = 5
# DECSC and DECRC keep the cursor's place, where the text goes on; DECSTBM lets only the rows above the line scroll.
_SAVE, _RESTORE = "\x1b7", "\x1b8"
# IND goes down a row, and scrolls at the last one; the column stays.
_MAKE_ROOM = "\x1bD\x1b[1A"


@contextlib.contextmanager
def bottom_line(text: Callable[[], str], *, enabled: bool = True) -> Iterator[None]:
    """Show a text in the last row of the terminal that stderr is, twice a second, while the block runs.

    That row is left out of scrolling meanwhile, so what is written to the same terminal, by whatever stream, stays whole; and it
    is empty afterwards.

    Args:
        text: gives it; "" shows nothing yet. Called in a thread of its own.
        enabled: nothing is shown otherwise, nor where stderr is no terminal or one that cannot move its cursor.
    """
    if not (enabled and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")):
        yield
        return
    line, over = _Line(), threading.Event()

    def update() -> None:
        while not over.wait(_EVERY_S):
            line.show(text())

    thread = threading.Thread(target=update, name="bigmodel-live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        try:
            thread.join()
        finally:  # also where a second interrupt comes
            line.close()


class _Line:
    """The last row, from its first text on. Each change is one write, after which the cursor is where it was."""

    def __init__(self) -> None:
        self._rows = 0  # of the terminal, when the row was set apart
        self._is_closed = False

    def show(self, text: str) -> None:
        if not text:
            return
        try:
            columns, rows = os.get_terminal_size(sys.stderr.fileno())
        except (OSError, ValueError):
            return
        begin = ""
        if rows != self._rows:
            begin = self._give_back()
            if rows >= _LEAST_ROWS:
                begin += f"{_MAKE_ROOM}{_SAVE}\x1b[1;{rows - 1}r{_RESTORE}"
            self._rows = rows if rows >= _LEAST_ROWS else 0
        if self._is_closed:
            return
        if not self._rows:
            self._write(begin)
            return
        self._write(f"{begin}{_SAVE}\x1b[{rows};1H\x1b[2K\x1b[2m{text[: columns - 1]}\x1b[0m{_RESTORE}")

    def close(self) -> None:
        self._is_closed = True
        self._write(self._give_back())
        self._rows = 0

    def _give_back(self) -> str:
        """What empties the row, and lets all of them scroll again."""
        return f"{_SAVE}\x1b[r\x1b[{self._rows};1H\x1b[2K{_RESTORE}" if self._rows else ""

    def _write(self, text: str) -> None:
        if not text:
            return
        with contextlib.suppress(OSError):  # the terminal is gone
            sys.stderr.write(text)
            sys.stderr.flush()
