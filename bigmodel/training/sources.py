"""What global batches are read from: a dataset that is asked for samples by number, or one that is gone through."""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bigmodel.draws import draws_kept
from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.draws import mixed, permuted, seed_draws
from bigmodel.training.losses import IGNORED
from bigmodel.training.place import Cursor, Division
from bigmodel.training.processes import Processes

__all__ = ["Divided", "GlobalBatch", "Iterated", "Listed", "Source", "refuse_without_rows"]

logger = logging.getLogger("bigmodel.training")

_AT_ONCE = 1024  # places of an order that are looked up together
_TOLD_S = 1.0  # samples that are skipped for longer are told


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

        def flat() -> Iterator[list[tuple[int, int, bool]]]:
            for batch in batches():
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
        for batch in batches():
            with draws_kept():
                made = [next(stream) for _ in division.passes(batch)]
            yield GlobalBatch(micro_batches=made, num_samples=len(batch), counted=division.counted(len(batch)))


@dataclass(frozen=True)
class _Place:
    """Where a pass over an iterable dataset is between two global batches.

    Attributes:
        number: of samples that were taken of it.
        state: the dataset's own; None where it has none.
    """

    number: int
    state: dict[str, Any] | None


class _Flow(Source):
    """An iterable dataset, whose place is come to by its own state where it has one, and by skipping otherwise."""

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any],
        *,
        batch_size: int | None = None,
        skips: bool = True,
    ) -> None:
        super().__init__(dataset=dataset, collate_fn=collate_fn, shuffles=False, batch_size=batch_size)
        self._skips = skips
        self._places: dict[tuple[int, int], _Place] = {}  # (epoch, consumed) -> after the last two global batches
        has_both = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._is_stateful = has_both and not _forgets(dataset)
        self._first = copy.deepcopy(dataset.state_dict()) if self._is_stateful else None
        self._was_moved = False  # whether the dataset was given a state that is not its first

    @property
    def num_samples(self) -> int:
        return 0

    def _begin(self, cursor: Cursor, salt: tuple[int, ...]) -> tuple[Iterator[Any], int]:
        """A pass from a place on, and how many samples were taken of it before."""
        place = _Place(0, None)
        if cursor.num_consumed:
            place = self._places[cursor.epoch, cursor.num_consumed]
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(cursor.epoch)
        if place.state is not None:
            self.dataset.load_state_dict(place.state)
        elif self._was_moved:
            self.dataset.load_state_dict(copy.deepcopy(self._first))
        self._was_moved = place.state is not None
        with draws_kept():
            seed_draws(*salt[:2])  # in all processes the same, of which some divide what they draw
            samples = iter(self.dataset)
        if place.state is None:
            self._skip(samples, salt, place.number)
        self._places = {(cursor.epoch, cursor.num_consumed): place}
        return samples, place.number

    def _note(self, epoch: int, consumed: int, number: int) -> None:
        """A global batch was read. A checkpoint may ask for the place after it, or for the one before."""
        state = copy.deepcopy(self.dataset.state_dict()) if self._is_stateful else None
        self._places = dict([*self._places.items()][-1:]) | {(epoch, consumed): _Place(number, state)}

    def _skip(self, samples: Iterator[Any], salt: tuple[int, ...], count: int) -> None:
        began_s = time.perf_counter()
        with draws_kept():
            skipped = len(_read(samples, salt, 0, count, keeps=False))
        took_s = time.perf_counter() - began_s
        if skipped < count:
            raise TrainingError(
                f"The place in the data is {count} samples from its beginning, and it has {skipped}. Give the same dataset."
            )
        if took_s > _TOLD_S:
            logger.info("%d samples were read and skipped in %.1f s to come to the place in the data", skipped, took_s)

    def _refuse_skipping(self, count: int, epoch: int, state: dict[str, Any] | None) -> None:
        if count and not self._skips and (state is None or not self._is_stateful):
            raise TrainingError(
                f"The place in the data is {count} samples from the beginning of epoch {epoch}, and a "
                f"{type(self.dataset).__name__} comes there by reading and skipping them, which skip_samples=False refuses. Give "
                "a dataset with state_dict and load_state_dict, or a map-style one."
            )


class Iterated(_Flow):
    """An iterable dataset of which each process goes through all and keeps its samples: they are the same for any number.

    Args:
        dataset, collate_fn, batch_size: as in `Source`.
        skips: whether a place may be come to by skipping.
    """

    def global_batches(self, cursor: Cursor, division: Division, drop_last: bool) -> Iterator[GlobalBatch]:
        salt = cursor.seed, cursor.epoch
        samples, number = self._begin(cursor, salt)
        while True:
            with draws_kept():
                chunk = _read(samples, salt, number, division.global_batch_size)
                if not chunk or (drop_last and len(chunk) < division.global_batch_size):
                    return
                made = [
                    _collated(self.collate_fn, chunk, micro, (*salt, number + micro[0][0], len(micro)))
                    for micro in division.passes(range(len(chunk)))
                ]
            number += len(chunk)
            self._note(cursor.epoch, number, number)
            yield GlobalBatch(micro_batches=made, num_samples=len(chunk), counted=division.counted(len(chunk)))

    def refuse(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        if state is not None and "parts" in state:
            raise TrainingError(
                f"The checkpoint's data was divided over {len(state['parts'])} processes, each of which went through a part of "
                "its own. Give prepare the same shard=."
            )
        self._refuse_skipping(cursor.num_consumed, cursor.epoch, None if state is None else state["whole"])

    def state(self, cursor: Cursor, processes: Processes) -> dict[str, Any] | None:
        place = self._places.get((cursor.epoch, cursor.num_consumed))
        return None if place is None or place.state is None else {"whole": place.state}

    def restore(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        known = None if state is None or not self._is_stateful else state["whole"]
        self._places = {(cursor.epoch, cursor.num_consumed): _Place(cursor.num_consumed, known)}


class Divided(_Flow):
    """An iterable dataset of which this process has a part of its own: the others' samples are never read here.

    Which samples are in a global batch follows from the parts, and so from the number of processes. An epoch ends when every
    part has.

    Args:
        part: this process's dataset.
        whole: how it was to be gone through.
        processes: all of them.
    """

    def __init__(self, part: Any, whole: Iterated, processes: Processes) -> None:
        super().__init__(part, whole.collate_fn, batch_size=whole.batch_size, skips=whole._skips)
        self._processes = processes

    def global_batches(self, cursor: Cursor, division: Division, drop_last: bool) -> Iterator[GlobalBatch]:
        rank, size, step = division.rank, division.num_processes, division.micro_batch_size
        shares = [len(range(each, division.global_batch_size, size)) for each in range(size)]
        salt = cursor.seed, cursor.epoch, rank
        samples, own = self._begin(cursor, salt)
        consumed, last = cursor.num_consumed, None
        while True:
            chunk, failed = [], None
            with draws_kept():
                try:
                    chunk = _read(samples, salt, own, shares[rank])
                except Exception as error:
                    failed = error
                last = chunk[-1] if chunk else last
                # The one thing that processes tell each other: nobody waits for one that failed, or has no more.
                told = self._processes.gathered((len(chunk), failed is not None, last is not None))
                if failed is not None:
                    raise failed
                if any(has_failed for _, has_failed, _ in told):
                    raise TrainingError("In another process the data raised an error; its message says which.")
                lengths = [length for length, _, _ in told]
                total, most = sum(lengths), max(lengths)
                have_all_ended = all(length < share for length, share in zip(lengths, shares, strict=True))
                if not total or (drop_last and have_all_ended):
                    return
                if not all(has_one for _, _, has_one in told):  # to fill places with
                    giver = lengths.index(most)
                    of_all = self._processes.gathered(last if rank == giver else None)
                    last = of_all[giver] if last is None else last
                places = [(place, place < len(chunk)) for place in range(most)]
                filled = chunk + [last] * (most - len(chunk))
                made = [
                    _collated(self.collate_fn, filled, micro, (*salt, own + micro[0][0], len(micro)))
                    for micro in (places[at : at + step] for at in range(0, most, step))
                ]
            counted = [[max(0, min(step, length - at)) for length in lengths] for at in range(0, most, step)]
            own, consumed = own + len(chunk), consumed + total
            self._note(cursor.epoch, consumed, own)
            yield GlobalBatch(micro_batches=made, num_samples=total, counted=counted)

    def refuse(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        parts = (state or {}).get("parts")
        if parts is None:
            raise TrainingError(
                "The checkpoint's data was not divided over processes, and this is. Give prepare the same shard=."
            )
        if len(parts) != self._processes.size:
            raise TrainingError(
                f"The checkpoint's data was divided over {len(parts)} processes, and there are {self._processes.size}: which "
                "samples were seen is known of those parts alone. Start as many, or give prepare no shard=."
            )
        number, known = parts[self._processes.rank]
        self._refuse_skipping(number, cursor.epoch, known)

    def state(self, cursor: Cursor, processes: Processes) -> dict[str, Any] | None:
        place = self._places[cursor.epoch, cursor.num_consumed] if cursor.num_consumed else _Place(0, None)
        return {"parts": processes.gathered((place.number, place.state))}

    def restore(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        assert state is not None  # or it was refused
        number, known = state["parts"][self._processes.rank]
        known = known if self._is_stateful else None
        self._places = {(cursor.epoch, cursor.num_consumed): _Place(number, known)}


def _read(samples: Iterator[Any], salt: tuple[int, ...], number: int, count: int, *, keeps: bool = True) -> list[Any]:
    """Samples that draw what follows from their number; None in the place of each that is not kept."""
    chunk: list[Any] = []
    for at in range(number, number + count):
        seed_draws(*(salt if at else salt[:2]), at)  # before the first, many draw the order that parts are taken of
        try:
            sample = next(samples)
        except StopIteration:
            break
        chunk.append(sample if keeps else None)
    return chunk


def _collated(
    collate_fn: Callable[[list[Any]], Any], chunk: list[Any], micro: list[tuple[int, bool]], salt: tuple[int, ...]
) -> Any:
    """A micro-batch of a chunk's samples, given as (place, whether it counts)."""
    seed_draws(*salt)
    batch = collate_fn([chunk[place] for place, _ in micro])
    return _without(batch, [counts for _, counts in micro])


def _forgets(dataset: Any) -> bool:
    """Whether its state leaves out samples that it holds: a shuffle buffer of Hugging Face's datasets, filled anew."""
    stages = [getattr(dataset, "_ex_iterable", None)]
    while stages:
        stage = stages.pop()
        if stage is None:
            continue
        if type(stage).__name__ == "BufferShuffledExamplesIterable":
            return True
        stages += [getattr(stage, "ex_iterable", None), *(getattr(stage, "ex_iterables", None) or ())]
    return False


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
        return _without(batch, [counts for _, _, counts in asked])


def _as_it_is(batch: Any) -> Any:
    """What a DataLoader collates that is given whole batches."""
    return batch


def _without(batch: Any, counts: list[bool]) -> Any:
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
