"""What global batches are read from; a dataset that is asked for samples by number."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bigmodel.draws import draws_kept
from bigmodel.errors import InvalidArgumentError
from bigmodel.training.draws import mixed, permuted, seed_draws
from bigmodel.training.losses import IGNORED
from bigmodel.training.place import Cursor, Division
from bigmodel.training.processes import Processes

__all__ = ["GlobalBatch", "Listed", "Source", "refuse_without_rows", "without_labels"]


_AT_ONCE = 1024  # places of an order that are looked up together


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """A global batch as one process has it.

    Attributes:
        micro_batches: of this process.
        num_samples: in all processes.
        counted: for each micro-batch, how many of its samples count in each process; those come first.
    """

    micro_batches: list[Any]
    num_samples: int
    counted: list[list[int]]


@dataclass(kw_only=True)
class Source(ABC):
    """Samples in an order that follows from a place in them.

    Attributes:
        dataset: the user's.
        collate_fn: samples -> batch.
        shuffles: whether the order is random, and ours.
        batch_size: of the user's DataLoader, or None.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    shuffles: bool = True
    batch_size: int | None = None

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Of an epoch; 0 where it is not known before its end."""

    @abstractmethod
    def global_batches(self, cursor: Cursor, division: Division, drop_last: bool) -> Iterator[GlobalBatch]:
        """Those from a place on to the end of the epoch."""

    def refuse(self, cursor: Cursor, state: dict[str, Any] | None) -> None:  # noqa: B027  # most come to any place
        """TrainingError where the place that was saved, with `state` of then, cannot be come to."""

    def state(self, cursor: Cursor, processes: Processes) -> dict[str, Any] | None:
        """Where the dataset itself was at a place between two global batches, if it can say so; all processes call it."""
        return None

    def restore(self, cursor: Cursor, state: dict[str, Any] | None) -> None:  # noqa: B027  # most need none
        """Where the dataset was at a place."""

    @property
    def fingerprint(self) -> str | None:
        """What the dataset calls its contents, if it does."""
        found = getattr(self.dataset, "_fingerprint", None)
        return found if isinstance(found, str) else None


@dataclass(kw_only=True)
class Listed(Source):
    """A map-style dataset: any place is reached at once, and workers make samples.

    Attributes:
        num_workers: of the DataLoader.
        options: of the DataLoader, handed on.
    """

    num_workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    def global_batches(self, cursor: Cursor, division: Division, drop_last: bool) -> Iterator[GlobalBatch]:
        size, epoch = division.global_batch_size, cursor.epoch
        end = cursor.num_samples
        if drop_last:
            end -= (end - cursor.num_consumed) % size

        def batches() -> Iterator[list[int]]:
            at_once = -(-_AT_ONCE // size) * size
            for begin in range(cursor.num_consumed, end, at_once):
                numbers = np.arange(begin, min(begin + at_once, end))
                if self.shuffles:
                    numbers = permuted(numbers, cursor.num_samples, mixed(cursor.seed, epoch))
                samples = numbers.tolist()
                yield from (samples[first : first + size] for first in range(0, len(samples), size))

        ahead, asked = itertools.tee(batches())  # workers are asked ahead of what is given

        def flat() -> Iterator[list[tuple[int, int, bool]]]:
            for batch in ahead:
                for micro in division.passes(batch):
                    yield [(sample, epoch, counts) for sample, counts in micro]

        loader = DataLoader(
            _Batches(self, cursor.seed),
            batch_sampler=flat(),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(cursor.seed),
            **self.options,
        )
        stream = iter(loader)
        for batch in asked:
            with draws_kept():
                made = [next(stream) for _ in division.passes(batch)]
            yield GlobalBatch(micro_batches=made, num_samples=len(batch), counted=division.counted(len(batch)))


class _Batches(Dataset[Any]):
    """Collated batches, whose random choices follow from seed, epoch and samples alone, in whichever process they are made.

    A sample is asked for as (its number, epoch, whether it counts); rows of those that do not count predict nothing.
    """

    def __init__(self, source: Listed, seed: int) -> None:
        self._source, self._seed = source, seed

    def __getitems__(self, asked: list[tuple[int, int, bool]]) -> Any:
        samples = []
        for number, epoch, _ in asked:
            seed_draws(self._seed, epoch, number)
            samples.append(self._source.dataset[number])
        seed_draws(self._seed, *asked[0][:2], len(asked))
        batch = self._source.collate_fn(samples)
        return without_labels(batch, [counts for _, _, counts in asked])


def _as_it_is(batch: Any) -> Any:
    """What a DataLoader collates that is given whole batches."""
    return batch


def without_labels(batch: Any, counts: list[bool]) -> Any:
    """A batch in which rows that do not count predict nothing."""
    empty = [row for row, does_count in enumerate(counts) if not does_count]
    if not empty:
        return batch
    refuse_without_rows(batch, len(counts))
    labels = batch["labels"].clone()
    labels[empty] = IGNORED
    return {**batch, "labels": labels}


def refuse_without_rows(batch: Any, num_rows: int | None = None) -> None:
    """InvalidArgumentError for batches in which samples cannot be left out."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or not labels.ndim or num_rows not in (None, labels.shape[0]):
        raise InvalidArgumentError(
            "A global batch that does not divide by the number of processes needs samples that do not count, and the batch has "
            "no labels with a row for each sample. Give a global_batch_size that divides, or drop_last=True."
        )
