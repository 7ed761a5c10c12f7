"""One pass at a time for each model, and what the interpreter's frames say of passes that hooks did not see end."""

from __future__ import annotations

import sys
import threading

from torch import nn

__all__ = ["PassLock", "num_calls"]


class PassLock:
    """One pass at a time; re-entrant; taken over from a thread that died, or was interrupted, in the middle of one.

    torch runs release hooks after exceptions, but not after Ctrl-C: a thread that took the lock for a pass and is in no
    module's call any more has lost its pass. As a context manager the lock is held for something else, and never taken over.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._owner: threading.Thread | None = None
        self._is_for_pass = True
        self.depth = 0

    def acquire(self, *, is_for_pass: bool = True) -> None:
        me = threading.current_thread()
        with self._condition:
            while self._owner is not None and self._owner is not me:
                if self._is_for_pass and not _is_calling(self._owner):
                    self.depth = 0
                    break
                self._condition.wait(timeout=0.2)
            self._owner, self._is_for_pass = me, is_for_pass
            self.depth += 1

    def release(self) -> None:
        with self._condition:
            self.depth -= 1
            if self.depth <= 0:
                self.depth = 0
                self._owner = None
                self._condition.notify()

    def is_mine(self) -> bool:
        return self._owner is threading.current_thread()

    def __enter__(self) -> None:
        self.acquire(is_for_pass=False)

    def __exit__(self, *exc: object) -> None:
        self.release()


def _is_calling(thread: threading.Thread) -> bool:
    """Whether a thread is inside a module's call."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back
    return False


def num_calls(module: nn.Module) -> int:
    """How many calls of a module this thread is in."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count
