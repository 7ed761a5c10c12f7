"""What a run tells trackers: figures of each step, the machine's, and one's own; none of them stops the training."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from bigmodel.device_map.machine import Machine
from bigmodel.errors import InvalidArgumentError, shown
from bigmodel.footprint import footprint_bytes
from bigmodel.training.config import PRECISIONS, TrainingConfig
from bigmodel.training.processes import Processes
from bigmodel.training.trackers import TRACKERS

if TYPE_CHECKING:
    from bigmodel.training.run import StepRecord

__all__ = ["Track", "Tracker", "Tracking"]

logger = logging.getLogger("bigmodel.training")

Values = Mapping[str, float]
Metric = TypeVar("Metric", bound=Callable[..., Any])


class Tracker(Protocol):
    """Where figures go. One's own has these three; and `images` and `table`, where it shows them.

    ::

        class Printed:
            def begin(self, name, hyperparameters): print(name, hyperparameters)
            def log(self, values, step): print(step, values)
            def end(self): print("done")

        with run.track("jsonl", Printed()): ...
    """

    def begin(self, name: str, hyperparameters: Mapping[str, Any]) -> None:
        """Before anything else: the run's name, and what it was asked for."""

    def log(self, values: Values, step: int) -> None:
        """Figures of an optimizer step."""

    def end(self) -> None:
        """After everything else."""


class Track:
    """What `TrainingRun.track` gives: figures, images and tables go to all trackers, from the main process.

    A tracker that fails is told of once, in a warning, and left out from then on.
    """

    def __init__(self, trackers: Sequence[Any], step: Callable[[], int]) -> None:
        self._trackers, self._step = list(trackers), step

    def log(self, values: Values, *, step: int | None = None) -> None:
        """Figures of one's own.

        Args:
            values: name -> number, or a tensor with one.
            step: the last optimizer step if None.
        """
        found = {str(name): float(value) for name, value in values.items()}
        self._each("log", found, self._step() if step is None else step)

    def images(self, name: str, images: Sequence[Any], *, step: int | None = None) -> None:
        """Images, in trackers that show them.

        Args:
            images: tensors ``[3 or 1, height, width]``, uint8, or floating from 0 to 1.
        """
        found = [_image(each) for each in images]
        self._each("images", name, found, self._step() if step is None else step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int | None = None
    ) -> None:
        """A table, in trackers that show them; of rows of as many values as there are columns."""
        wrong = next((row for row in rows if len(row) != len(columns)), None)
        if wrong is not None:
            raise InvalidArgumentError(
                f"A row of table {name!r} has {len(wrong)} values, and there are {len(columns)} columns."
            )
        found = [[_plain(each) for each in row] for row in rows]
        self._each("table", name, list(columns), found, self._step() if step is None else step)

    def _each(self, verb: str, *args: Any) -> None:
        for tracker in tuple(self._trackers):
            method = getattr(tracker, verb, None)
            if method is None:
                continue
            try:
                method(*args)
            except Exception as error:
                self._trackers.remove(tracker)
                logger.warning(
                    "tracker %s failed in %s and is left out from now on: %s: %s",
                    type(tracker).__name__, verb, type(error).__name__, error,
                )  # fmt: skip


class Tracking:
    """`TrainingRun`'s part that tells trackers."""

    processes: Processes
    config: TrainingConfig
    _num_positions: int  # of the passes since the last step

    if TYPE_CHECKING:

        @property
        def is_main_process(self) -> bool: ...
        def _hyperparameters(self) -> dict[str, Any]: ...
        def _tracked_name(self) -> str: ...
        def _flops_per_position(self) -> float: ...
        def _last_number(self) -> int: ...

    def _begin_tracking(self) -> None:
        self._track: Track | None = None
        self._metrics: list[tuple[int, Callable[..., Any]]] = []
        self._told_at, self._num_positions = 0.0, 0

    @contextlib.contextmanager
    def track(
        self,
        *trackers: str | Tracker,
        folder: str | os.PathLike[str] = "runs",
        name: str | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> Iterator[Track]:
        """Tell trackers of each optimizer step while the block runs: what `last_step` has, memory, tokens/s, and the share of the
        machine's arithmetic that the model's own takes (model FLOPs utilisation), where its rates were measured.

        Every process enters it; the main one alone writes.

        Args:
            trackers: of "jsonl" (a line of JSON for each step), "tensorboard", or objects with the methods of
                `Tracker`; "jsonl" if there is none.
            folder: where they write what they keep on this machine, in a folder with the run's name.
            name: of the run; a part of what its checkpoints call it if None, the same after it was gone on with.
            hyperparameters: further ones, beside the configuration's.

        Yields:
            What figures of one's own go to.

        Raises:
            InvalidArgumentError: there is no such tracker, or the run is tracked already.
        """
        if self._track is not None:
            raise InvalidArgumentError(
                "The run is tracked already. Give all trackers at once: run.track('jsonl', 'tensorboard')."
            )
        for each in trackers:
            if isinstance(each, str) and each not in TRACKERS:
                raise InvalidArgumentError(
                    f"There is no tracker {shown(each)}. There are: {', '.join(TRACKERS)}, or your own."
                )
            if not isinstance(each, str) and not callable(getattr(each, "log", None)):
                raise InvalidArgumentError(f"A {type(each).__name__} is no tracker. Give one with begin, log and end.")
        called = name or self._tracked_name()
        made: list[Any] = []
        if self.is_main_process:
            place = Path(folder) / called
            made = [
                TRACKERS[each](folder=place, step=self._last_number()) if isinstance(each, str) else each
                for each in trackers or ("jsonl",)
            ]
        self._track = track = Track(made, self._last_number)
        self._told_at = time.perf_counter()
        peak = peak_flops_per_s(self.processes.device, self.config.precision) if self.is_main_process else None
        self._step_flops = None if peak is None else (self._flops_per_position(), peak * self.processes.size)
        track._each("begin", called, {**self._hyperparameters(), **(hyperparameters or {})})
        try:
            yield track
        finally:
            self._track = None
            track._each("end")

    def metric(self, function: Metric | None = None, *, every: int = 1) -> Any:
        """A decorator: what the function returns goes to trackers, after each step, or each so many.

        ::

            @run.metric(every=100)
            def held_out(record):
                return {"held-out loss": run.evaluate(held_out_loader).loss}

        Args:
            function: of the `StepRecord`, called in every process; returns a number, which has the function's name, or numbers by
                name.
            every: so many steps.
        """
        if not isinstance(every, int) or every < 1:
            raise InvalidArgumentError(f"every is {shown(every)}. Give a whole number from 1 on.")

        def add(function: Metric) -> Metric:
            self._metrics.append((every, function))
            return function

        return add if function is None else add(function)

    def _tell(self, record: StepRecord, num_positions: int) -> None:
        """After each optimizer step, in every process.

        Args:
            num_positions: tokens, or other places of the input, that all processes passed.
        """
        if self._track is None:
            return
        now = time.perf_counter()
        seconds, self._told_at = now - self._told_at, now
        values: dict[str, Any] = {
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "num_tokens": record.num_tokens,
            "skipped": record.skipped,
            "step_s": seconds,
            "memory_bytes": memory_bytes(self.processes.device),
        }
        if num_positions:
            values["tokens_per_s"] = num_positions / seconds
            if self._step_flops is not None:
                needed, possible = self._step_flops
                values["mfu"] = needed * num_positions / seconds / possible
        for every, function in self._metrics:
            if record.step % every == 0:
                found = function(record)
                values |= found if isinstance(found, Mapping) else {getattr(function, "__name__", "metric"): found}
        self._track.log(values, step=record.step)
        if self._metrics:  # what they took is not the next step's
            self._told_at = time.perf_counter()


def memory_bytes(device: torch.device) -> int:
    """What this process holds where it computes: the most since the last time; on a host what is private now."""
    if device.type == "cpu":
        return footprint_bytes()
    held = int(torch.accelerator.max_memory_allocated(device))
    torch.accelerator.reset_peak_memory_stats(device)
    return held


def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """Of products in a run's dtype, of one process: what `bigmodel calibrate` measured here; None where it did not.

    Processes on a host share its processors.
    """
    machine = Machine.probe()
    if not machine.rates_from.startswith("measured"):
        return None
    host = device.type == "cpu"
    known = {each.device for each in machine.accelerators} | {"cpu"}
    name = "cpu" if host else str(device)
    if name not in known:
        return None
    curve = machine.rates_of(name).products.get(str(PRECISIONS[precision])[6:])
    if not curve:
        return None
    return max(rate for _, rate in curve) / (max(1, machine.num_sharing) if host else 1)


def positions_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Tokens that a pass computes, or places of embeddings: of the inputs that models name so, or the first tensor."""
    ids = kwargs.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    embedded = kwargs.get("inputs_embeds")
    if isinstance(embedded, torch.Tensor):
        return embedded.shape[:-1].numel()
    first = next((each for each in args if isinstance(each, torch.Tensor)), None)
    return 0 if first is None else first.numel() if not first.is_floating_point() else first.shape[:-1].numel()


def num_multiplied(module: nn.Module) -> float:
    """Parameters that a token is multiplied with: without tables that are looked up in, and of a mixture the experts that it is
    given to."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    routed = getattr(text, "num_experts_per_tok", None)
    tables = [each.weight for each in module.modules() if isinstance(each, nn.Embedding)]
    products = {id(each.weight) for each in module.modules() if isinstance(each, nn.Linear)}
    found = float(sum(each.numel() for each in module.parameters()))
    found -= sum(each.numel() for each in tables if id(each) not in products)
    if experts and routed:
        of_experts = sum(each.numel() for name, each in module.named_parameters() if ".experts." in name)
        found -= of_experts * max(0.0, 1 - routed / experts)
    return found


def flops_per_position(num_trained: int, num_params: int, multiplied: float) -> float:
    """FLOPs that a model's forward and backward need for a token, recomputation not counted.

    Args:
        num_trained, num_params: parameters that are trained, and all.
        multiplied: `num_multiplied`.

    Source: Chowdhery et al., PaLM, 2022, appendix B: 6 for each parameter that a token is multiplied with; 4 where it is
    frozen, which has no gradient. Attention's own is left out: it grows with the sequence.
    """
    return multiplied * (4 + 2 * num_trained / max(1, num_params))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _image(image: Any) -> torch.Tensor:
    """``[channels, height, width]``, uint8."""
    tensor = torch.as_tensor(image).detach().cpu()
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3):
        raise InvalidArgumentError(f"An image has shape {tuple(tensor.shape)}. Give [3 or 1, height, width].")
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()) or float(tensor.min()) < 0 or float(tensor.max()) > 1:
            raise InvalidArgumentError("An image has values outside of 0 to 1. Give those, or uint8.")
        tensor = (255 * tensor).round()
    return tensor.to(torch.uint8)
