"""What global batches are read from: a dataset that is asked for samples by number, or one that is gone through."""

from __future__ import annotations

import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bigmodel.draws import draws_kept
from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training.draws import mixed, seed_draws
from bigmodel.training.losses import IGNORED
from bigmodel.training.place import Cursor, Division
from bigmodel.training.processes import Processes

__all__ = ["Divided", "GlobalBatch", "Iterated", "Listed", "Source", "refuse_without_rows"]

logger = logging.getLogger("bigmodel.training")

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

    def state(self, cursor: Cursor) -> dict[str, Any] | None:
        """Where the dataset itself was at a place between two global batches, if it can say so."""
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
        order = _order(cursor) if self.shuffles else torch.arange(cursor.num_samples)
        order = order[cursor.num_consumed :]
        if drop_last:
            order = order[: len(order) // size * size]

        def batches() -> Iterator[list[int]]:
            for begin in range(0, len(order), size):
                yield order[begin : begin + size].tolist()

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
            made = [next(stream) for _ in division.passes(batch)]
            yield GlobalBatch(micro_batches=made, num_samples=len(batch), counted=division.counted(len(batch)))


@dataclass(kw_only=True)
class Iterated(Source):
    """An iterable dataset: each process goes through all of it and keeps its samples, so that these are the same for any number.

    A place is reached by the dataset's own state where it has one, and by skipping otherwise.

    Attributes:
        skips: whether it may be reached by skipping.
    """

    skips: bool = True
    _restored: tuple[Cursor, dict[str, Any]] | None = None
    _latest: tuple[int, int, dict[str, Any]] | None = None  # epoch, samples consumed, the dataset's state there

    @property
    def num_samples(self) -> int:
        return 0

    def global_batches(self, cursor: Cursor, division: Division, drop_last: bool) -> Iterator[GlobalBatch]:
        salt = cursor.seed, cursor.epoch
        number = left = cursor.num_consumed
        state = None
        if self._restored is not None:
            place, known = self._restored
            if place.epoch == cursor.epoch and place.num_consumed <= number:
                state, left = known, number - place.num_consumed
        samples = _begun(self.dataset, salt, state)
        self._skip(samples, salt, number - left, left)
        while True:
            chunk = _read(samples, salt, number, division.global_batch_size)
            if not chunk or (drop_last and len(chunk) < division.global_batch_size):
                return
            made = [
                _collated(self.collate_fn, chunk, micro, (*salt, number + micro[0][0], len(micro)))
                for micro in division.passes(range(len(chunk)))
            ]
            number += len(chunk)
            if self._is_stateful:
                self._latest = cursor.epoch, number, copy.deepcopy(self.dataset.state_dict())
            yield GlobalBatch(micro_batches=made, num_samples=len(chunk), counted=division.counted(len(chunk)))

    def refuse(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        if state is not None and "parts" in state:
            raise TrainingError(
                f"The checkpoint's data was divided over {len(state['parts'])} processes, each of which went through a part of "
                "its own. Give prepare the same shard=."
            )
        if cursor.num_consumed and not self.skips and (state is None or not self._is_stateful):
            raise TrainingError(
                f"The place in the data is {cursor.num_consumed} samples from the beginning of epoch {cursor.epoch}, and a "
                f"{type(self.dataset).__name__} comes there by reading and skipping them, which skip_samples=False refuses. Give "
                "a dataset with state_dict and load_state_dict, or a map-style one."
            )

    def state(self, cursor: Cursor) -> dict[str, Any] | None:
        if self._latest is None or self._latest[:2] != (cursor.epoch, cursor.num_consumed):
            return None
        return self._latest[2]

    def restore(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        self._restored = self._latest = None
        if state is not None and self._is_stateful:
            self._restored = cursor, state
            self._latest = cursor.epoch, cursor.num_consumed, state

    @property
    def _is_stateful(self) -> bool:
        has_both = all(callable(getattr(self.dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        return has_both and not _forgets(self.dataset)

    def _skip(self, samples: Iterator[Any], salt: tuple[int, ...], begin: int, count: int) -> None:
        began_s = time.perf_counter()
        skipped, consumed = len(_read(samples, salt, begin, count, keeps=False)), begin + count
        took_s = time.perf_counter() - began_s
        if skipped < count:
            raise TrainingError(
                f"The place in the data is {consumed} samples from its beginning, and it has {consumed - count + skipped}. Give "
                "the same dataset."
            )
        if took_s > _TOLD_S:
            logger.info("%d samples were read and skipped in %.1f s to come to the place in the data", skipped, took_s)


@dataclass(kw_only=True)
class Divided(Iterated):
    """An iterable dataset of which this process has a part of its own: the others' samples are never read here.

    Which samples are in a global batch follows from the parts, and so from the number of processes. An epoch ends when every
    part has.

    Attributes:
        processes: all of them.
    """

    processes: Processes
    _places: dict[tuple[int, int], tuple[int, dict[str, Any] | None]] = field(default_factory=dict)
    _from: tuple[int, int, int, dict[str, Any] | None] | None = None  # epoch, consumed, own samples, state

    def global_batches(self, cursor: Cursor, division: Division, drop_last: bool) -> Iterator[GlobalBatch]:
        rank, size = division.rank, division.num_processes
        salt = cursor.seed, cursor.epoch, rank
        share = division.global_batch_size // size + (rank < division.global_batch_size % size)
        own, state = 0, None
        if self._from is not None and self._from[:2] == (cursor.epoch, cursor.num_consumed):
            own, state = self._from[2:]
        elif cursor.num_consumed:
            own, state = self._places[cursor.epoch, cursor.num_consumed]
        samples = _begun(self.dataset, salt, state)
        if state is None:
            self._skip(samples, salt, 0, own)
        consumed, last = cursor.num_consumed, None
        self._places = {(cursor.epoch, consumed): (own, state)}
        while True:
            chunk = _read(samples, salt, own, share)
            lengths = self.processes.gathered(len(chunk))
            total, most = sum(lengths), max(lengths)
            if not total or (drop_last and total < division.global_batch_size):
                return
            last = chunk[-1] if chunk else last
            if last is None and most:
                raise TrainingError(
                    f"This process's part of the data has no sample, and another's has. Give each of the {size} processes one."
                )
            places = [(place, place < len(chunk)) for place in range(most)]
            filled = chunk + [last] * (most - len(chunk))
            step = division.micro_batch_size
            made = [
                _collated(self.collate_fn, filled, micro, (*salt, own + micro[0][0], len(micro)))
                for micro in (places[at : at + step] for at in range(0, most, step))
            ]
            counted = [[max(0, min(step, length - at)) for length in lengths] for at in range(0, most, step)]
            own, consumed = own + len(chunk), consumed + total
            known = copy.deepcopy(self.dataset.state_dict()) if self._is_stateful else None
            # Those of the global batch under way, and of the one before, which a checkpoint may ask for.
            self._places = dict([*self._places.items()][-1:]) | {(cursor.epoch, consumed): (own, known)}
            yield GlobalBatch(micro_batches=made, num_samples=total, counted=counted)

    def refuse(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        parts = (state or {}).get("parts")
        if parts is None:
            raise TrainingError(
                "The checkpoint's data was not divided over processes, and this is. Give prepare the same shard=."
            )
        if len(parts) != self.processes.size:
            raise TrainingError(
                f"The checkpoint's data was divided over {len(parts)} processes, and there are {self.processes.size}: which "
                "samples were seen is known of those parts alone. Start as many, or give prepare no shard=."
            )
        own, known = parts[self.processes.rank]
        if own:
            super().refuse(cursor, known)

    def state(self, cursor: Cursor) -> dict[str, Any] | None:
        own: tuple[int, dict[str, Any] | None] = (0, None)
        if cursor.num_consumed:
            own = self._places[cursor.epoch, cursor.num_consumed]
        return {"parts": self.processes.gathered(own)}

    def restore(self, cursor: Cursor, state: dict[str, Any] | None) -> None:
        assert state is not None  # or it was refused
        own, known = state["parts"][self.processes.rank]
        self._from = cursor.epoch, cursor.num_consumed, own, known if self._is_stateful else None
        self._places = {(cursor.epoch, cursor.num_consumed): (own, self._from[3])}


def _begun(dataset: Any, salt: tuple[int, ...], state: dict[str, Any] | None) -> Iterator[Any]:
    """A pass over a dataset, from a state of its own on, that draws what follows from the seed and the epoch: in all processes
    the same, of which some divide what they draw."""
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(salt[1])
    if state is not None:
        dataset.load_state_dict(state)
    with draws_kept():
        seed_draws(*salt[:2])
        return iter(dataset)


def _read(samples: Iterator[Any], salt: tuple[int, ...], number: int, count: int, *, keeps: bool = True) -> list[Any]:
    """Samples that draw what follows from their number; None in the place of each that is not kept."""
    chunk: list[Any] = []
    with draws_kept():
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
    with draws_kept():
        seed_draws(*salt)
        batch = collate_fn([chunk[place] for place, _ in micro])
    return _without(batch, [counts for _, counts in micro])


def _forgets(dataset: Any) -> bool:
    """Whether its state leaves out samples that it holds: a shuffle buffer of Hugging Face's datasets, filled anew."""
    stage = getattr(dataset, "_ex_iterable", None)
    while stage is not None:
        if type(stage).__name__ == "BufferShuffledExamplesIterable":
            return True
        stage = getattr(stage, "ex_iterable", None)
    return False


def _order(cursor: Cursor) -> torch.Tensor:
    """Of an epoch's samples: 10 ms for a million."""
    generator = torch.Generator().manual_seed(mixed(cursor.seed, cursor.epoch))
    return torch.randperm(cursor.num_samples, generator=generator)


class _Batches(Dataset[Any]):
    """Collated batches, whose random choices follow from seed, epoch and samples alone, in whichever process they are made.

    A sample is asked for as (its number, epoch, whether it counts); rows of those that do not count predict nothing.
    """

    def __init__(self, source: Listed, seed: int) -> None:
        self._source, self._seed = source, seed

    def __getitems__(self, asked: list[tuple[int, int, bool]]) -> Any:
        samples = []
        with draws_kept():
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
