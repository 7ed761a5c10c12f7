"""The checkpoints of one run: what is in them beside the engine's tensors, and when they are written."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.checkpoint import begin_save, load_state
from bigmodel.training.folders import complete_ones, prune
from bigmodel.training.processes import Processes
from bigmodel.training.strategy import Engine

__all__ = ["Hook", "Saves"]

logger = logging.getLogger("bigmodel.training")

Hook = Callable[[Path], None]
"""Called with the folder of a checkpoint."""


class Saves:
    """Writes checkpoints, at once or while training goes on, and reads them.

    Args:
        processes: all of them.

    Attributes:
        run_id: the same for all checkpoints of a run, also after it was gone on with.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._apart: Processes | None = None  # for threads that save
        self._thread: _Thread | None = None
        self._registered: list[Any] = []
        self._on_save: list[Hook] = []
        self._on_load: list[Hook] = []
        self.run_id: str = processes.same(uuid.uuid4().hex)

    def register(self, objects: tuple[Any, ...]) -> None:
        """Objects whose state is part of each checkpoint."""
        for each in objects:
            if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
                raise InvalidArgumentError(
                    f"A {type(each).__name__} has no state_dict and load_state_dict. Give an object that has both."
                )
        self._registered += objects

    def add_hooks(self, on_save: Hook | None, on_load: Hook | None) -> None:
        """Functions that write files of their own into each checkpoint, and read them."""
        for name, hook in (("on_save", on_save), ("on_load", on_load)):
            if hook is not None and not callable(hook):
                raise InvalidArgumentError(f"{name} is a {type(hook).__name__}. Give a function of the folder.")
        self._on_save += [on_save] if on_save is not None else []
        self._on_load += [on_load] if on_load is not None else []

    def write(
        self,
        folder: Path,
        engine: Engine,
        optimizer: Optimizer | None,
        manifest: Mapping[str, Any],
        others: Callable[[], Mapping[str, Any]],
        *,
        keep: int | None,
        wait: bool,
    ) -> None:
        """As `TrainingRun.save`.

        Args:
            others: called when all processes have come.
        """
        if keep is not None and (not isinstance(keep, int) or keep < 1):
            raise InvalidArgumentError(f"keep is {keep!r}. Give a whole number from 1 on, or None.")
        self.finish()
        begun = begin_save(
            folder,
            engine,
            optimizer,
            {"run": self.run_id, **manifest},
            lambda: {"registered": [each.state_dict() for each in self._registered], **others()},
            self._processes,
            hooks=tuple(self._on_save),
            copies=not wait,
        )

        def work(processes: Processes) -> None:
            begun(processes)
            error: BaseException | None = None
            if keep is not None and processes.is_main:
                try:
                    prune(folder.absolute().parent, self.run_id, keep)
                except OSError as caught:
                    error = caught
            processes.all_right(error)

        if wait:
            work(self._processes)
        else:
            self._apart = self._apart or self._processes.apart()
            self._thread = _Thread(work, self._apart)

    def finish(self) -> None:
        """For what was begun to be written; raises what went wrong with it."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.finish()

    def read(
        self,
        folder: Path,
        engine: Engine,
        optimizer: Optimizer | None,
        refuse: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `TrainingRun.load`; the manifest and the other values that were saved.

        Args:
            refuse: called with both before anything is changed; raises where they do not fit.
        """
        self.finish()

        def refuse_others(manifest: Mapping[str, Any], others: Mapping[str, Any]) -> None:
            if len(others["registered"]) != len(self._registered):
                raise TrainingError(
                    f"{folder} holds {len(others['registered'])} registered objects, and {len(self._registered)} are "
                    "registered. Register the same ones, in the same order, before run.load."
                )
            refuse(manifest, others)

        manifest, others = load_state(folder, engine, optimizer, refuse_others, self._processes)
        for each, state in zip(self._registered, others["registered"], strict=True):
            each.load_state_dict(state)
        self.run_id = manifest["run"]
        return manifest, others

    def loaded(self, folder: Path) -> None:
        """All that a checkpoint holds was read: what hooks wrote is read too."""
        error: BaseException | None = None
        try:
            for hook in self._on_load:
                hook(folder)
        except Exception as caught:
            error = caught
        self._processes.all_right(error)

    def newest(self, folder: Path) -> Path | None:
        """The newest complete checkpoint inside a folder, the same in all processes."""
        self.finish()
        found = complete_ones(folder) if self._processes.is_main else []
        newest: Path | None = self._processes.same(found[0][0] if found else None)  # what others list may be older
        return newest


class _Thread:
    """Writes; the interpreter does not end before it has."""

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
