"""Which process failed first, and why: of all that ended when one of them did."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "first_of"]

# What a process says whose partner is gone.
_CONNECTION = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket closed|remote process exited|peer closed|"
    r"Another process failed|monitoredBarrier|failed to pass|timed out waiting|watchdog",
    re.IGNORECASE,
)
# Signals by which a process ends of itself, or is ended from outside; not those that follow from another's end.
_OWN = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU, signal.SIGSYS}
# Between the first end and those that the launcher itself brought about by SIGKILL.
_PROMPT_S = 5.0
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that did not end well.

    Attributes:
        rank: among all processes.
        exit_code: as `subprocess` has it: below 0 the signal's number; None where nobody saw it.
        at_s: when it said why, or was seen to have ended; seconds of the clock.
        why: what it said; empty where it said nothing.
        trace: its traceback, where there is one.
        errors: the file that its stderr went to, if one did.
    """

    rank: int
    exit_code: int | None
    at_s: float
    why: str = ""
    trace: str = ""
    errors: Path | None = None

    def told(self, *, is_out_of_memory: bool = False) -> str:
        """What became of it, in a clause.

        Args:
            is_out_of_memory: whether the system killed a process for lack of memory meanwhile.
        """
        if self.exit_code is None and not self.why:
            return f"ended without a word, as what is killed does{': ' if (last := self._last_words()) else ''}{last}"
        if self.exit_code is not None and self.exit_code < 0:
            try:
                name = f"signal {-self.exit_code} ({signal.Signals(-self.exit_code).name})"
            except ValueError:
                name = f"signal {-self.exit_code}"
            killed = -self.exit_code == signal.SIGKILL
            memory = (
                ", by the system, which was out of memory"
                if is_out_of_memory
                else ", as systems do that are out of memory"
            )
            return f"was killed by {name}{memory if killed else ''}"
        return f"failed: {self.why or self._last_words() or f'it ended with status {self.exit_code}'}"

    def _last_words(self) -> str:
        """Of its stderr: the line that ends the last traceback, or the last line."""
        if self.errors is None:
            return ""
        try:
            with self.errors.open("rb") as file:
                file.seek(max(0, self.errors.stat().st_size - _TAIL_BYTES))
                lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        starts = [place for place, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        for line in lines[starts[-1] + 1 :] if starts else ():
            if not line.startswith(" "):
                return line.strip()
        return lines[-1].strip() if lines else ""

    def _kind(self, first_s: float) -> int:
        """0 for a cause, more for what follows from one."""
        if self.exit_code is None and not self.why:
            return 0
        if self.exit_code is not None and self.exit_code < 0:
            if -self.exit_code in _OWN and self.at_s - first_s < _PROMPT_S:
                return 0
            return 2 if -self.exit_code == signal.SIGABRT else 4
        if _CONNECTION.search(self.why or self._last_words()):
            return 3
        return 1 if self.why else 2


def first_of(ended: Iterable[Ended]) -> Ended:
    """The one that the others followed: killed from outside or by a fault of its own, or with the first error that is not about
    a partner that is gone."""
    ended = list(ended)
    first_s = min(each.at_s for each in ended)
    return min(ended, key=lambda each: (each._kind(first_s), each.at_s, each.rank))
