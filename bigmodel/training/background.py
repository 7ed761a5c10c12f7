"""A checkpoint that is written while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from bigmodel.training.processes import Processes

__all__ = ["Saving"]

logger = logging.getLogger("bigmodel.training")


class Saving:
    """A thread that writes; the interpreter does not end before it has.

    Args:
        work: writes.
        processes: over a group of their own.
    """

    def __init__(self, work: Callable[[Processes], None], processes: Processes) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, processes), name="bigmodel-saving")
        self._thread.start()

    def finish(self) -> None:
        """Wait for it; raises what went wrong."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[Processes], None], processes: Processes) -> None:
        try:
            work(processes)
        except BaseException as error:
            self._error = error
            logger.error("a checkpoint was not written: %s", error)
