"""Which samples are in which global batch, whoever takes them: an order that a seed and an epoch give, and a place in it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.flows import Divided, Iterated
from bigmodel.training.place import Cursor, Division
from bigmodel.training.processes import Processes
from bigmodel.training.sources import Listed, Source, refuse_without_rows

__all__ = ["GlobalLoader", "Shard", "data_of"]

logger = logging.getLogger("bigmodel.training")

_GIVEN = itertools.count()

Shard = str | Callable[[Any, int, int], Any]
"""What makes a process's part of iterable data: of dataset, rank and number of processes; "node" is Hugging Face datasets'."""


def data_of(
    data: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
    num_workers: int,
    *,
    processes: Processes,
    shard: Shard | None = None,
    skips: bool = True,
) -> Source:
    """A dataset, or what a DataLoader of the user's holds.

    Args:
        shard: what makes a process's part of iterable data; None where each goes through all of it.
        skips: whether a place in iterable data may be come to by skipping.

    Raises:
        InvalidArgumentError: it cannot be gone through twice, or its DataLoader picks samples by a rule of its own.
    """
    dataset, batch_size = data, None
    if isinstance(data, DataLoader):
        dataset, batch_size, collate_fn, num_workers = data.dataset, data.batch_size, data.collate_fn, data.num_workers
    if not _is_listed(dataset):
        _refuse_workers(dataset, num_workers)
        iterated = Iterated(dataset, collate_fn or default_collate, batch_size=batch_size, skips=skips)
        return iterated if shard is None else _divided(iterated, shard, processes)
    if shard is not None:
        raise InvalidArgumentError(
            "shard was given, and the data is map-style: each process asks for the samples of its places alone. Leave it out."
        )
    if not isinstance(data, DataLoader):
        return Listed(dataset=dataset, collate_fn=collate_fn or default_collate, num_workers=num_workers)
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
    if data.persistent_workers:
        logger.info("persistent_workers is left out: the DataLoader's workers are started anew for each epoch")
    options = {"pin_memory": data.pin_memory, "timeout": data.timeout, "worker_init_fn": data.worker_init_fn}
    if data.num_workers:
        options |= {"prefetch_factor": data.prefetch_factor, "multiprocessing_context": data.multiprocessing_context}
    return Listed(
        dataset=data.dataset,
        collate_fn=data.collate_fn,
        num_workers=data.num_workers,
        shuffles=shuffles,
        batch_size=data.batch_size,
        options=options,
    )


def _is_listed(dataset: Any) -> bool:
    """Whether it can be asked for a sample by its number.

    Raises:
        InvalidArgumentError: it is empty.
    """
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return False
    if not len(dataset):
        raise InvalidArgumentError("The dataset is empty. Give one with samples.")
    return True


def _refuse_workers(dataset: Any, num_workers: int) -> None:
    """InvalidArgumentError for iterable data that cannot be gone through again, or in other processes."""
    if not hasattr(dataset, "__iter__") or hasattr(dataset, "__next__"):
        raise InvalidArgumentError(
            f"The data is a {type(dataset).__name__}, which cannot be gone through more than once. Give a map-style dataset, or "
            "an IterableDataset."
        )
    if num_workers:
        raise InvalidArgumentError(
            f"num_workers is {num_workers}, and the data is iterable: it is gone through in the process itself, so that its "
            "order is known. Give num_workers=0, or a map-style dataset."
        )


def _divided(whole: Iterated, shard: Shard, processes: Processes) -> Divided:
    """This process's part of iterable data."""
    if shard == "node":
        try:
            from datasets.distributed import split_dataset_by_node

            part = split_dataset_by_node(whole.dataset, rank=processes.rank, world_size=processes.size)
        except (ImportError, AttributeError) as error:
            raise InvalidArgumentError(
                f'shard is "node", which divides an IterableDataset of Hugging Face\'s datasets, and the data is a '
                f"{type(whole.dataset).__name__}. Give a function of dataset, rank and number of processes."
            ) from error
    elif callable(shard):
        part = shard(whole.dataset, processes.rank, processes.size)
    else:
        raise InvalidArgumentError(
            f'shard is {shard!r}. Give "node", a function of dataset, rank and number of processes, or None.'
        )
    _refuse_workers(part, 0)
    return Divided(part, whole, processes)


class GlobalLoader:
    """Micro-batches of this process, a global batch at a time; one pass over it is one epoch, or the rest of it.

    Args:
        source: of the samples.
        division: of global batches.
        cursor: where to begin.
        drop_last: whether a last global batch that is not full is left out.
        begin: called with the micro-batches of each global batch before the first of them is given; gives them back.

    Attributes:
        cursor: where the next global batch begins.
        division: of a global batch.
        is_last: whether the micro-batch that was given last is the last of its global batch.
        is_touched: whether there are gradients of a global batch that was not stepped; set by who makes them.
        number: of the micro-batch that was given last, in its global batch.
        counted: of its samples in each process, how many count and do not only fill places.
        given_at: grows with each micro-batch that any loader gives; -1 before the first.
    """

    def __init__(
        self,
        source: Source,
        division: Division,
        cursor: Cursor,
        *,
        drop_last: bool,
        begin: Callable[[list[Any]], list[Any]],
    ) -> None:
        self.dataset = source.dataset
        self.cursor = replace(
            cursor, num_samples=source.num_samples, shuffles=source.shuffles, fingerprint=source.fingerprint
        )
        self.is_last = True
        self.is_touched = False
        self.number, self.counted = 0, [0] * division.num_processes
        self.given_at = -1
        self._source, self.division = source, division
        self._drop_last, self._begin = drop_last, begin
        self._pass = 0  # whose iterator may give batches
        self._given = 0  # samples of the global batch under way

    def __len__(self) -> int:
        """Micro-batches of an epoch; TypeError where that is not known before its end."""
        if not self.cursor.num_samples:
            raise TypeError("how many samples an iterable dataset has is not known before its end")
        division = self.division
        full, rest = divmod(self.cursor.num_samples, division.global_batch_size)
        count = full * len(division.passes(range(division.global_batch_size)))
        return count + (len(division.passes(range(rest))) if rest and not self._drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch with the next pass; where it is the one under way, go on in it."""
        if epoch != self.cursor.epoch:
            self.restart(epoch)

    def restart(self, epoch: int) -> None:
        """Begin this epoch anew with the next pass."""
        self.cursor = replace(self.cursor, epoch=epoch, num_consumed=0)

    def refuse_other(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
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
        self._source.refuse(cursor, state)
        prints = {self.cursor.fingerprint, cursor.fingerprint} - {None}
        if len(prints) > 1:
            logger.warning("the dataset calls its contents by another name than the checkpoint's: are they the same?")

    def state(self, processes: Processes) -> dict[str, Any] | None:
        """Where the dataset itself is, beside `cursor`; None where that says all. All processes call it."""
        return self._source.state(self.cursor, processes)

    def resume(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        """Begin the next pass at a place that was saved, with `state` of then."""
        self._pass += 1
        self.cursor = replace(cursor, fingerprint=self.cursor.fingerprint)
        self._source.restore(cursor, state)

    def refuse_inside(self, what: str) -> None:
        """TrainingError where there are gradients of a global batch that was not stepped."""
        if self.is_touched:
            raise TrainingError(
                f"To {what} the global batch that was begun must be stepped: call run.step after each of its micro-batches."
            )

    @property
    def is_under_way(self) -> bool:
        """Whether micro-batches were given of a global batch that was not stepped."""
        return self._given > 0

    def stepped(self) -> None:
        """The global batch that was given is consumed."""
        self.cursor = replace(self.cursor, num_consumed=self.cursor.num_consumed + self._given)
        self._given, self.is_touched = 0, False

    def __iter__(self) -> Iterator[Any]:
        self.refuse_inside("begin a pass over the data")
        self._pass += 1
        self._given = 0  # what was only looked at comes again
        own, division = self._pass, self.division
        first = next(batches := self._source.global_batches(self.cursor, division, self._drop_last), None)
        if first is None and self.cursor.num_consumed:
            self._next_epoch()
            first = next(batches := self._source.global_batches(self.cursor, division, self._drop_last), None)
        for batch in itertools.chain([] if first is None else [first], batches):
            if any(len(set(each)) > 1 for each in batch.counted):  # in all processes, also where no place is empty
                for each in batch.micro_batches:
                    refuse_without_rows(each)
            together = self._begin(batch.micro_batches)
            for number, each in enumerate(together):
                self._refuse_stale(own)
                self.number, self.is_last, self._given = number, number == len(together) - 1, batch.num_samples
                self.counted = batch.counted[number]
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
