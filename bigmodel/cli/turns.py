"""Which prompts a process answers next: all of them alone, or its turns among the processes that a launcher started."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from bigmodel.cli.prompts import Answers
from bigmodel.errors import BigModelError, InvalidArgumentError

__all__ = ["Turns", "num_launched"]

Answered = Sequence[Mapping[str, Any]]

# Between two looks for what others have answered.
_LOOK_S = 0.1
# That one of them loads its model, and reads what was answered before.
_BEGINNING = timedelta(hours=1)


def num_launched() -> int:
    """Processes of this one's launcher; 1 where there is none."""
    text = os.environ.get("WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1


class Turns:
    """Prompts that are taken in turn, and their answers, written in the order of the prompts.

    With several processes each takes the next ones when it has answered its last, wherever it is; the main process alone writes.
    They talk through the store that torch's launcher has (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), and nothing else.

    Args:
        output: of `Answers`.
        prompts: all of them, in order, the same in all processes.

    Attributes:
        is_main: whether this process writes.
        size: how many take turns.
        num_done: prompts that were answered before.
        num_written: prompts that have their answer in the file.
        num_tokens: of the answers that were written by this run.

    Raises:
        InvalidArgumentError: as `Answers`; or processes were given different prompts.
    """

    def __init__(self, output: str | None, prompts: Sequence[Mapping[str, Any]]) -> None:
        self.size, self.is_main, self.num_tokens = num_launched(), True, 0
        self._total, self._next = len(prompts), 0
        self._store: Any = None
        if self.size > 1:
            self._store, rank = _store()
            self.is_main = rank == 0
        digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
        self._answers = None
        if self.is_main:
            self._answers = Answers(output, prompts)
            self.num_done = self._answers.num_done
            if self._store is not None:
                self._store.set("begun", f"{digest} {self.num_done}")
        else:
            self._store.wait(["begun"], _BEGINNING)
            theirs, done = self._store.get("begun").decode().split()
            if theirs != digest:
                raise InvalidArgumentError(
                    "The main process was given other prompts than this one. Give all of them the same file."
                )
            self.num_done = int(done)
        self.num_written = self._next = self.num_done

    def take(self, number: int) -> range:
        """The next prompts, at most so many, which nobody else answers; none when all are taken."""
        if self._store is None:
            first, self._next = self._next, self._next + number
        else:
            first = self.num_done + self._store.add("taken", number) - number
        taken = range(min(first, self._total), min(first + number, self._total))
        if not taken and not self.is_main:
            self._store.add("left", 1)  # the store may be the main process's, which waits for this
        return taken

    def put(self, first: int, answered: Answered) -> None:
        """Answers to prompts that were taken, from the number of the first on; written when those before them are."""
        if self._store is not None:
            self._store.set(f"answers {first}", json.dumps(list(answered)))
            self._write_what_is_there()
        else:
            self._write(answered)

    def finish(self, report: Any = None) -> None:
        """For the main process to write what others have not answered yet, and to wait until none of them needs it.

        Args:
            report: called with how many are written, while it waits.
        """
        while self.is_main and self.num_written < self._total:
            self._write_what_is_there()
            if report is not None:
                report(self.num_written - self.num_done)
            time.sleep(_LOOK_S)
        while self.is_main and self._store is not None and self._store.add("left", 0) < self.size - 1:
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Close the file."""
        if self._answers is not None:
            self._answers.close()

    def _write_what_is_there(self) -> None:
        while self.is_main and self.num_written < self._total:
            key = f"answers {self.num_written}"
            if not self._store.check([key]):
                return
            self._write(json.loads(self._store.get(key)))
            self._store.delete_key(key)

    def _write(self, answered: Answered) -> None:
        assert self._answers is not None
        self._answers.write(answered)
        self.num_written += len(answered)
        self.num_tokens += sum(each["num_tokens"] for each in answered)


def _store() -> tuple[Any, int]:
    """The launcher's store, and this process's rank."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, _ = next(iter(rendezvous("env://", timeout=_BEGINNING)))
    except (ValueError, RuntimeError) as error:
        raise BigModelError(
            f"WORLD_SIZE is {num_launched()}, and the other processes cannot be reached: {' '.join(str(error).split())}. Start "
            "them with bigmodel launch --module bigmodel run, or unset WORLD_SIZE."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"bigmodel prompts {attempt}", store), rank
