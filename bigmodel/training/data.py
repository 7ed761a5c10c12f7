"""Which samples are in which global batch, whoever takes them: an order that a seed and an epoch give, and a place in it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.losses import IGNORED

__all__ = ["Cursor", "Division", "GlobalLoader", "Loaded", "data_of", "mixed"]

logger = logging.getLogger("bigmodel.training")

_GIVEN = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A place in the data, the same in all processes.

    Attributes:
        seed, epoch: what the order follows from.
        num_consumed: samples of this epoch that optimizer steps, or the loop, have taken.
        num_samples: of the dataset.
        shuffles: whether the order is random.
    """

    seed: int
    epoch: int = 0
    num_consumed: int = 0
    num_samples: int = 0
    shuffles: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a global batch is divided.

    Attributes:
        global_batch_size: samples of an optimizer step.
        micro_batch_size: samples of a pass of one process.
        rank, num_processes: of this process, and of all.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int
    num_processes: int

    def passes(self, samples: Sequence[int]) -> list[list[tuple[int, bool]]]:
        """Micro-batches of this process: (sample, whether it counts) each.

        Every process has as many places, ceil(samples / processes), and as many passes of the same sizes; an empty place is a
        copy of a sample that does not count.
        """
        num_places = -(-len(samples) // self.num_processes)
        places = [
            (samples[place], True) if place < len(samples) else (samples[-1], False)
            for place in range(self.rank, num_places * self.num_processes, self.num_processes)
        ]
        size = self.micro_batch_size
        return [places[begin : begin + size] for begin in range(0, num_places, size)]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was found to iterate over.

    Attributes:
        dataset: map-style.
        collate_fn: samples -> batch.
        num_workers: of the DataLoader.
        shuffles: whether the order is random.
        batch_size: of the user's DataLoader, or None.
        options: of the DataLoader, handed on.
    """

    dataset: Dataset[Any]
    collate_fn: Callable[[list[Any]], Any]
    num_workers: int = 0
    shuffles: bool = True
    batch_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def data_of(data: Any, collate_fn: Callable[[list[Any]], Any] | None, num_workers: int) -> Loaded:
    """A dataset, or what a DataLoader of the user's holds.

    Raises:
        InvalidArgumentError: it has no length, or its DataLoader picks samples by a rule of its own.
    """
    if not isinstance(data, DataLoader):
        _refuse_endless(data)
        return Loaded(dataset=data, collate_fn=collate_fn or default_collate, num_workers=num_workers)
    _refuse_endless(data.dataset)
    sampler = data.sampler
    if data.batch_size is None or not isinstance(sampler, (RandomSampler, SequentialSampler)):
        picks = data.batch_sampler if data.batch_size is None else sampler
        raise InvalidArgumentError(
            f"The DataLoader picks samples with a {type(picks).__name__}. Give one with batch_size and shuffle, or "
            "the dataset alone, whose order follows from the seed and the epoch."
        )
    if data.drop_last:
        raise InvalidArgumentError(
            "The DataLoader has drop_last=True, which is about global batches here. Give TrainingConfig(drop_last=True) instead."
        )
    length = len(data.dataset)  # type: ignore[arg-type]
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != length):
        raise InvalidArgumentError(
            f"The DataLoader's RandomSampler draws {sampler.num_samples} of {length} samples, or some again. Give "
            "one that takes each sample once an epoch."
        )
    shuffles = isinstance(sampler, RandomSampler)
    if shuffles:
        logger.info("the DataLoader's random sampler is replaced: the order follows from the seed and the epoch")
    options = {"pin_memory": data.pin_memory, "timeout": data.timeout, "worker_init_fn": data.worker_init_fn}
    if data.num_workers:
        options |= {"prefetch_factor": data.prefetch_factor, "multiprocessing_context": data.multiprocessing_context}
    return Loaded(
        dataset=data.dataset,
        collate_fn=data.collate_fn,
        num_workers=data.num_workers,
        shuffles=shuffles,
        batch_size=data.batch_size,
        options=options,
    )


def _refuse_endless(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InvalidArgumentError(
            f"The data is a {type(dataset).__name__}, which has no length or cannot be asked for a sample by its number. Give a "
            "map-style dataset."
        )
    if not len(dataset):
        raise InvalidArgumentError("The dataset is empty. Give one with samples.")


class GlobalLoader:
    """Micro-batches of this process, a global batch at a time; one pass over it is one epoch, or the rest of it.

    Args:
        loaded: dataset, collate function and workers.
        division: of global batches.
        cursor: where to begin.
        drop_last: whether a last global batch that is not full is left out.
        begin: called with the micro-batches of each global batch before the first of them is given; gives them back.

    Attributes:
        cursor: where the next global batch begins.
        is_last: whether the micro-batch that was given last is the last of its global batch.
        is_touched: whether there are gradients of a global batch that was not stepped; set by who makes them.
        number: of the micro-batch that was given last, in its global batch.
        num_rows: its samples in each process.
        num_counted: its samples in all processes, without what fills empty places.
        given_at: grows with each micro-batch that any loader gives; -1 before the first.
    """

    def __init__(
        self,
        loaded: Loaded,
        division: Division,
        cursor: Cursor,
        *,
        drop_last: bool,
        begin: Callable[[list[Any]], list[Any]],
    ) -> None:
        self.dataset = loaded.dataset
        length = len(loaded.dataset)  # type: ignore[arg-type]
        self.cursor = replace(cursor, num_samples=length, shuffles=loaded.shuffles)
        self.is_last = True
        self.is_touched = False
        self.number = self.num_rows = self.num_counted = 0
        self.given_at = -1
        self._loaded, self._division = loaded, division
        self._drop_last, self._begin = drop_last, begin
        self._pass = 0  # whose iterator may give batches
        self._given = 0  # samples of the global batch under way

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        division = self._division
        full, rest = divmod(self.cursor.num_samples, division.global_batch_size)
        count = full * len(division.passes(range(division.global_batch_size)))
        return count + (len(division.passes(range(rest))) if rest and not self._drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch anew with the next pass."""
        self.cursor = replace(self.cursor, epoch=epoch, num_consumed=0)

    def refuse_other(self, cursor: Cursor) -> None:
        """TrainingError for a place in other data, or inside a global batch."""
        if cursor.num_samples != self.cursor.num_samples:
            raise TrainingError(
                f"The checkpoint's data has {cursor.num_samples} samples, and this has {self.cursor.num_samples}. Give the same "
                "dataset."
            )
        if cursor.shuffles != self.cursor.shuffles:
            orders = {True: "a random order", False: "its own order"}
            then, now = orders[cursor.shuffles], orders[self.cursor.shuffles]
            raise TrainingError(f"The checkpoint's data came in {then}, and this comes in {now}. Give the same.")
        self.refuse_inside("load a checkpoint")

    def resume(self, cursor: Cursor) -> None:
        """Begin the next pass at a place that was saved."""
        self._pass += 1
        self.cursor = cursor

    def refuse_inside(self, what: str) -> None:
        """TrainingError where there are gradients of a global batch that was not stepped."""
        if self.is_touched:
            raise TrainingError(
                f"To {what} the global batch that was begun must be stepped: call run.step after each of its micro-batches."
            )

    def stepped(self) -> None:
        """The global batch that was given is consumed."""
        self.cursor = replace(self.cursor, num_consumed=self.cursor.num_consumed + self._given)
        self._given, self.is_touched = 0, False

    def __iter__(self) -> Iterator[Any]:
        self.refuse_inside("begin a pass over the data")
        self._pass += 1
        self._given = 0  # what was only looked at comes again
        own = self._pass
        order = self._rest()
        if not len(order):
            self._next_epoch()
            order = self._rest()
        epoch, size = self.cursor.epoch, self._division.global_batch_size

        def batches() -> Iterator[list[int]]:
            for begin in range(0, len(order), size):
                yield order[begin : begin + size].tolist()

        def flat() -> Iterator[list[tuple[int, int, bool]]]:
            for batch in batches():
                for micro in self._division.passes(batch):
                    yield [(sample, epoch, counts) for sample, counts in micro]

        loader = DataLoader(
            _Batches(self._loaded, self.cursor.seed),
            batch_sampler=flat(),
            collate_fn=_as_it_is,
            num_workers=self._loaded.num_workers,
            generator=torch.Generator().manual_seed(self.cursor.seed),
            **self._loaded.options,
        )
        stream = iter(loader)
        for batch in batches():
            passes = self._division.passes(batch)
            read = [next(stream) for _ in passes]
            if len(batch) % self._division.num_processes:  # in all processes, also where no place is empty
                for each in read:
                    _refuse_without_rows(each)
            together = self._begin(read)
            for number, each in enumerate(together):
                self._refuse_stale(own)
                self.number, self.is_last, self._given = number, number == len(together) - 1, len(batch)
                processes, places = self._division.num_processes, self._division.micro_batch_size
                self.num_rows = len(passes[number])
                self.num_counted = min(len(batch) - number * places * processes, self.num_rows * processes)
                self.given_at = next(_GIVEN)
                yield each
            self._refuse_stale(own)
            self.refuse_inside("take the next global batch")
            self.stepped()  # where nobody trains
        self._next_epoch()

    def _refuse_stale(self, own: int) -> None:
        if own != self._pass:
            raise TrainingError(
                "This pass over the data is over: another was begun, or a checkpoint was loaded, since. Begin a new one."
            )

    def _next_epoch(self) -> None:
        self.cursor = replace(self.cursor, epoch=self.cursor.epoch + 1, num_consumed=0)

    def _rest(self) -> torch.Tensor:
        """Sample numbers of the rest of the epoch, int64."""
        cursor, size = self.cursor, self._division.global_batch_size
        order = _order(cursor) if self._loaded.shuffles else torch.arange(cursor.num_samples)
        rest = order[cursor.num_consumed :]
        return rest[: len(rest) // size * size] if self._drop_last else rest


def _order(cursor: Cursor) -> torch.Tensor:
    """Of an epoch's samples: 10 ms for a million."""
    generator = torch.Generator().manual_seed(mixed(cursor.seed, cursor.epoch))
    return torch.randperm(cursor.num_samples, generator=generator)


def mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Batches(Dataset[Any]):
    """Collated batches, whose random choices follow from seed, epoch and samples alone, in whichever process they are made.

    A sample is asked for as (its number, epoch, whether it counts); rows of those that do not count predict nothing.
    """

    def __init__(self, loaded: Loaded, seed: int) -> None:
        self._loaded, self._seed = loaded, seed

    def __getitems__(self, asked: list[tuple[int, int, bool]]) -> Any:
        samples = []
        with _draws_kept():
            for number, epoch, _ in asked:
                _seed_draws(self._seed, epoch, number)
                samples.append(self._loaded.dataset[number])
            _seed_draws(self._seed, *asked[0][:2], len(asked))
            batch = self._loaded.collate_fn(samples)
        empty = [row for row, (_, _, counts) in enumerate(asked) if not counts]
        if not empty:
            return batch
        _refuse_without_rows(batch, len(asked))
        labels = batch["labels"].clone()
        labels[empty] = IGNORED
        return {**batch, "labels": labels}


def _as_it_is(batch: Any) -> Any:
    """What a DataLoader collates that is given whole batches."""
    return batch


@contextlib.contextmanager
def _draws_kept() -> Iterator[None]:
    """Random generators of the host go on afterwards where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_draws(*numbers: int) -> None:
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # the CPU alone


def _refuse_without_rows(batch: Any, num_rows: int | None = None) -> None:
    """InvalidArgumentError for batches in which samples cannot be left out."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or not labels.ndim or num_rows not in (None, labels.shape[0]):
        raise InvalidArgumentError(
            "A global batch that does not divide by the number of processes needs samples that do not count, and the batch has "
            "no labels with a row for each sample. Give a global_batch_size that divides, or drop_last=True."
        )
