"""Datasets that are gone through: by each process as a whole, or each by one process as a part of its own."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bigmodel.draws import draws_kept
from bigmodel.errors import TrainingError
from bigmodel.training.draws import seed_draws
from bigmodel.training.place import Cursor, Division
from bigmodel.training.processes import Processes
from bigmodel.training.sources import GlobalBatch, Source, without_labels

__all__ = ["Divided", "Iterated"]

logger = logging.getLogger("bigmodel.training")

_TOLD_S = 1.0  # samples that are skipped for longer are told


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
        self._first = _state_before(dataset) if self._is_stateful else None
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
        if place.state is not None or self._was_moved:
            state = self._first if place.state is None else place.state
            if state is None:
                raise TrainingError(
                    f"The {type(self.dataset).__name__} was given a state to go on from, and cannot go back to its beginning: "
                    "its state_dict raises before the first pass. Prepare a new one."
                )
            self.dataset.load_state_dict(copy.deepcopy(state))  # which may keep and change what it is given
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


def _state_before(dataset: Any) -> dict[str, Any] | None:
    """A dataset's state before its first pass; None where it has none until then."""
    try:
        state: dict[str, Any] = copy.deepcopy(dataset.state_dict())
    except Exception:  # of the user's code
        return None
    return state


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
    return without_labels(batch, [counts for _, counts in micro])


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
