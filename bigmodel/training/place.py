"""A place in the data, and how a global batch from there is divided over processes and passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Cursor", "Division"]


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A place in the data, the same in all processes.

    Attributes:
        seed, epoch: what the order follows from.
        num_consumed: samples of this epoch that optimizer steps, or the loop, have taken.
        num_samples: of the dataset; 0 where that is not known before its end.
        shuffles: whether the order is random, and ours.
        fingerprint: what the dataset calls its contents, if it does.
    """

    seed: int
    epoch: int = 0
    num_consumed: int = 0
    num_samples: int = 0
    shuffles: bool = True
    fingerprint: str | None = None

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

    def counted(self, num_samples: int) -> list[list[int]]:
        """For each micro-batch of a global batch, how many of its samples count in each process."""
        held = [len(range(rank, num_samples, self.num_processes)) for rank in range(self.num_processes)]
        size = self.micro_batch_size
        return [[max(0, min(size, each - begin)) for each in held] for begin in range(0, max(held), size)]
