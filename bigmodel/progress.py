"""Progress bars for long work; the only file, beside the command line, that knows rich."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from bigmodel.units import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["GENERATING", "MEASURING", "PLANNING", "Report", "progress_bar"]

PATIENCE_S = 1.0
"""Work that ends sooner shows no bar: it would only flicker."""

MEASURING, PLANNING, GENERATING = "measuring the machine", "planning", "answering"
"""Phases whose progress is counted in steps, all others' in bytes."""


class Report(Protocol):
    """What long work calls, from any thread, as often as it likes."""

    def __call__(self, phase: str, done: int, total: int, /) -> None:
        """Tells how far a phase is.

        Args:
            phase: what is being done, such as ``"reading weights"``; each phase has its own bar.
            done: bytes done so far; steps, where the phase is `MEASURING`, `PLANNING` or `GENERATING`.
            total: likewise in all; 0 where it is not known.
        """


@contextmanager
def progress_bar(enabled: bool | Report | None = None, *, beside: Callable[[], str] | None = None) -> Iterator[Report]:
    """Shows bars on stderr, with bytes or steps, rate and time left, for every phase that takes over a second.

    Answers are waited for: the bar of `GENERATING` is there at once.

    The bars are gone afterwards: what stays on the screen is what the program printed.

    Args:
        enabled: None shows bars where stderr is a terminal; a callable is told instead.
        beside: gives what stands beside the bar of `GENERATING`; asked twice a second at most.

    Yields:
        What the work calls: ``report(phase, done, total)``.
    """
    if callable(enabled):
        yield enabled
        return
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield _silent
        return
    bars = _Bars(beside)
    try:
        yield bars.report
    finally:
        bars.close()


def _silent(phase: str, done: int, total: int, /) -> None:
    return None


class _Bars:
    """One display, begun with the first phase that outlasts PATIENCE_S."""

    def __init__(self, beside: Callable[[], str] | None = None) -> None:
        self._beside = beside
        self._lock = threading.Lock()
        self._began_s: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._display: Progress | None = None
        self._is_closed = False

    def report(self, phase: str, done: int, total: int, /) -> None:
        now_s = time.monotonic()
        with self._lock:
            if self._is_closed:
                return
            began_s = self._began_s.setdefault(phase, now_s)
            if phase not in self._tasks:
                is_early = now_s - began_s < PATIENCE_S and phase != GENERATING
                if is_early or (total and done >= total):
                    return
                self._display = self._display or _start_display(self._beside)
                # The clock of a task starts when it is added; the bytes done before it must not count as speed.
                self._tasks[phase] = self._display.add_task(phase, total=total or None, completed=done)
            assert self._display is not None
            self._display.update(self._tasks[phase], completed=done, total=total or None)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._display is not None:
                self._display.stop()


def _start_display(beside: Callable[[], str] | None = None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """Bytes done, bytes in all and rate, in the units that everything else here is printed in."""

        def render(self, task: Task) -> Text:
            if task.description in (MEASURING, PLANNING):
                return Text(f"{task.percentage:.0f}%")
            if task.description == GENERATING:
                return Text(f"{task.completed:.0f} of {task.total or 0:.0f}")
            text = format_bytes(task.completed)
            if task.total is not None:
                text += f" of {format_bytes(task.total)}"
            if task.speed is not None:
                text += f", {format_bytes(task.speed)}/s"
            return Text(text)

    class Beside(ProgressColumn):
        """What is told beside the answers."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(beside() if beside is not None and task.description == GENERATING else "")

    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Amount(),
        TimeRemainingColumn(),
        Beside(),
        console=Console(stderr=True),
        transient=True,
    )
    display.start()
    return display
