"""The seam between a slot and the work that reads it: on an accelerator work is queued, on the CPU it is done when it returns.

Accelerators will bring their own `Streams`: a copy stream beside the compute stream, and events between the two.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Event", "HostStreams", "Streams"]


class Event(Protocol):
    """A point in a device's queue of work."""

    def synchronize(self) -> None:
        """Return when the work before this point is done."""


class Streams(Protocol):
    """What the streamer asks of a device."""

    def mark(self) -> Event:
        """An event after all work that was given to the compute stream so far."""


class _Past:
    """An event that has happened."""

    def synchronize(self) -> None:
        pass


class HostStreams:
    """The CPU: an operation is done when its call returns, so every event is past."""

    _PAST = _Past()

    def mark(self) -> Event:
        return self._PAST
