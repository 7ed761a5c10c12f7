"""What comes next: the order of units, learned from the passes that were seen."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Schedule"]

# Contexts of two units tell apart where a unit that is used twice in a pass is followed by different ones.
_CONTEXT = 2


class Schedule:
    """Predicts which units are entered next.

    Before anything was seen it is the order of definition, wrapping around. Afterwards it is what followed the last time that
    the same units were entered in the same order, so that the end of a pass leads to the beginning of the next, an
    encoder to its decoder, and a branch that was taken to the branch taken last. A wrong guess costs time, never correctness.

    Args:
        units: their numbers, in order of definition.
    """

    def __init__(self, units: Sequence[int]) -> None:
        self._units = list(units)
        self._place = {unit: place for place, unit in enumerate(units)}
        self._history: list[int] = []
        self._last_seen: dict[tuple[int, ...], int] = {}
        # Long enough for a pass in which units are used several times; then the older half is forgotten.
        self._keep = max(64, 8 * len(units))

    def entered(self, unit: int) -> None:
        """Note that `unit` is entered now."""
        history = self._history
        # A context points at its latest *completed* occurrence, that is one that something followed.
        for length in range(1, _CONTEXT + 1):
            if len(history) >= length:
                self._last_seen[tuple(history[-length:])] = len(history)
        history.append(unit)
        if len(history) > 2 * self._keep:
            self._forget()

    def upcoming(self, num_units: int) -> list[int]:
        """The next entries, the soonest first; `num_units` of them, with repetitions where a unit comes twice."""
        found: list[int] = []
        context = self._history[-_CONTEXT:]
        while self._units and len(found) < num_units:
            position = self._find(context)
            if position is None:
                after = self._place.get(context[-1], -1) + 1 if context else 0
                following = [self._units[after % len(self._units)]]
            else:  # as it went on the last time, to the end of what was seen
                following = self._history[position : position + num_units - len(found)]
            found += following
            context = [*context, *following[-_CONTEXT:]][-_CONTEXT:]
        return found

    def _find(self, context: list[int]) -> int | None:
        for length in range(min(_CONTEXT, len(context)), 0, -1):
            position = self._last_seen.get(tuple(context[-length:]))
            if position is not None and position < len(self._history):
                return position
        return None

    def _forget(self) -> None:
        cut = len(self._history) - self._keep
        self._history = self._history[cut:]
        self._last_seen = {key: at - cut for key, at in self._last_seen.items() if at - cut >= len(key)}
