"""A logical tensor of which this process holds a range of its flattened values, as checkpoints take it: rectangles of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from bigmodel.training.processes import Processes

__all__ = ["Pieces", "rectangles"]

Offsets = tuple[int, ...]


class Pieces(torch.Tensor):
    """Stands for the whole in a state dict that torch.distributed.checkpoint saves or loads; nothing is computed with it.

    Args:
        shape: of the logical tensor.
        start: in its values in row-major order, where the range begins.
        flat: this process's values, ``[number of values]``; they are written from and read into where they are.
    """

    start: int
    flat: torch.Tensor

    @staticmethod
    def __new__(cls, shape: Sequence[int], start: int, flat: torch.Tensor) -> Pieces:
        made: Pieces = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=flat.dtype, device=flat.device)
        return made

    def __init__(self, shape: Sequence[int], start: int, flat: torch.Tensor) -> None:
        self.start, self.flat = start, flat

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pieces({tuple(self.shape)}, values {self.start} to {self.start + self.flat.numel()})"

    def whole(self, processes: Processes) -> torch.Tensor:
        """All values, in every process; all of them call it."""
        values = torch.empty(math.prod(self.shape), dtype=self.dtype)
        held = torch.tensor([self.start, self.flat.numel()], dtype=torch.int64)
        ranges = [torch.empty_like(held) for _ in range(processes.size)]
        if processes.size == 1:
            ranges = [held]
        else:
            dist.all_gather(ranges, held, group=processes.host_group)
        for rank, (start, number) in enumerate(each.tolist() for each in ranges):
            if number:
                part = values[start : start + number]
                if rank == processes.rank:
                    part.copy_(self.flat)
                if processes.size > 1:
                    dist.broadcast(part, src=rank, group=processes.host_group)
        return values.view(self.shape)

    # --- What torch.distributed.checkpoint asks a tensor of which there are parts

    def __create_write_items__(self, name: str, tensor: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in rectangles(self.shape, self.start, self.start + self.flat.numel())
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        at = self.start
        for offsets, sizes in rectangles(self.shape, self.start, self.start + self.flat.numel()):
            number = math.prod(sizes)
            if index.offset is None or tuple(index.offset) == offsets:
                return self.flat[at - self.start : at - self.start + number].view(sizes)
            at += number
        raise ValueError(f"{index.fqn} has no rectangle at {index.offset} in this process")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} of a tensor of which this process holds a range: use its flat values")


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Offsets, Offsets]]:
    """(offsets, sizes) of rectangles that make up a range of a tensor's values in row-major order, in that order.

    There are at most 2d - 1 of them in d dimensions: an incomplete row before the whole ones, and one after them.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _within(shape, last, 0, stop - last * row)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[tuple[Offsets, Offsets]]:
    for offsets, sizes in rectangles(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)
