"""Trackers that there are: a file of JSON lines, and TensorBoard, each in a class."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["TRACKERS"]

Rows = Sequence[Sequence[Any]]


class JsonLines:
    """``metrics.jsonl``: a line for each step, the first with what the run was asked for; continued where there is one."""

    def __init__(self, *, folder: Path, step: int) -> None:
        self._folder = folder
        self._file: Any = None

    def begin(self, name: str, hyperparameters: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._write({"name": name, "hyperparameters": _plain(hyperparameters)})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **_plain(values)})

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        self._write({"step": step, name: {"columns": list(columns), "rows": _plain(rows)}})

    def end(self) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({**line, "time": round(time.time(), 3)}, allow_nan=False) + "\n")
        self._file.flush()


class TensorBoard:
    """torch's own writer; of a run that was gone on with, what came after the step that it goes on from is not shown."""

    def __init__(self, *, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step
        self._writer: Any = None

    def begin(self, name: str, hyperparameters: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1 if self._step else None)
        self._writer.add_text(
            "hyperparameters", f"```\n{json.dumps(_plain(hyperparameters), indent=1)}\n```", self._step
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, name: str, images: Sequence[torch.Tensor], step: int) -> None:
        for number, image in enumerate(images):
            self._writer.add_image(f"{name}/{number}", image, step)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(
            "| " + " | ".join(str(each).replace("|", "\\|").replace("\n", " ") for each in row) + " |" for row in lines
        )
        self._writer.add_text(name, text, step)

    def end(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[..., Any]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
}
"""By the names that `TrainingRun.track` knows them under; each is made of a folder and the step that it goes on from."""


def _plain(value: Any) -> Any:
    """What JSON can hold: a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
