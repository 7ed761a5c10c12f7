"""Where the elements of a tensor stand in files, followed through operations that only move elements. Pure geometry.

A tensor that was put together from stored ones is covered by boxes: rectangles of its index space, each filled with the
elements of one stored tensor at fixed strides. Slicing crops boxes, stacking shifts them, a reshape merges and splits
their dimensions; at the end each box is a few runs of bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from bigmodel.checkpoint.spec import Extent, TensorSpec

__all__ = ["MOVERS", "Box", "Boxes", "Move", "Shape", "extents_of", "whole"]

# Below this average, and when inputs are cut to pieces, reading them whole and placing them in memory is cheaper than
# reading piece by piece: a read costs about as much as copying some KiB.
_SMALL_RANGE_BYTES = 4096
_PIECES_PER_INPUT = 4
_MAX_RANGES = 1 << 14  # of one tensor: a list of more takes longer to make and to follow than the bytes take to copy
_MAX_BOXES = 1 << 16  # more pieces than this are not followed

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A rectangle of a tensor's index space, and the elements of one stored tensor that stand in it.

    Element ``start + i`` (per dimension, ``0 <= i < size``) is element ``base + sum(i * stride)`` of `spec`, row-major.
    """

    spec: TensorSpec
    base: int
    start: Shape
    size: Shape
    stride: Shape


Boxes = tuple[Box, ...]


class Move(NamedTuple):
    """One operation on tensors that are covered by boxes.

    Attributes:
        placed: the boxes and the shape of each tensor that goes in.
        outs: the shape of each that comes out.
        args, kwargs: as the operation got them.
    """

    placed: Sequence[tuple[Boxes, Shape]]
    outs: Sequence[Shape]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def dim(self, position: int = 1) -> int:
        """The `dim` argument, counted from the left in the tensor that goes in."""
        dim: int = self.argument(position, "dim", 0)
        return dim % max(len(self.placed[0][1]), 1)


def whole(spec: TensorSpec) -> Boxes:
    """The boxes of a stored tensor as it is: one, or none where it is empty."""
    if 0 in spec.shape:
        return ()
    return (Box(spec, 0, (0,) * len(spec.shape), spec.shape, _row_major(spec.shape)),)


def extents_of(boxes: Boxes, shape: Shape, itemsize: int) -> tuple[Extent, ...] | None:
    """The byte ranges of a tensor that is covered by `boxes`, ordered, adjacent ones merged.

    Args:
        boxes: cover the index space of `shape` once.
        shape: of the tensor, which is laid out row-major.
        itemsize: bytes of an element, in the file as in the tensor.

    Returns:
        None where inputs are cut into so many or so small pieces that they are better read whole and placed in memory.
    """
    into_stride = _row_major(shape)
    inner = [_first_contiguous_dim(box, into_stride) for box in boxes]
    num_runs = sum(math.prod(box.size[:dim]) for box, dim in zip(boxes, inner, strict=True))
    num_bytes = math.prod(shape) * itemsize
    num_inputs = len({id(box.spec) for box in boxes})
    small = num_bytes < num_runs * _SMALL_RANGE_BYTES
    if num_runs > num_inputs * _PIECES_PER_INPUT and (small or num_runs > _MAX_RANGES):
        return None

    ranges: list[tuple[int, str, int, int]] = []  # into, file, offset, length: bytes
    for box, dim in zip(boxes, inner, strict=True):
        length = math.prod(box.size[dim:]) * itemsize
        into = _dot(box.start, into_stride)
        for index in itertools.product(*map(range, box.size[:dim])):
            target, source = into + _dot(index, into_stride), box.base + _dot(index, box.stride)
            ranges.append((target * itemsize, box.spec.file, box.spec.offset + source * itemsize, length))
    ranges.sort()

    merged: list[tuple[int, str, int, int]] = []
    covered = 0
    for into, file, offset, length in ranges:
        if into != covered:
            return None  # never seen; but a hole would be a wrong weight that nobody notices
        covered += length
        if merged and merged[-1][1] == file and merged[-1][2] + merged[-1][3] == offset:
            merged[-1] = (*merged[-1][:3], merged[-1][3] + length)
        else:
            merged.append((into, file, offset, length))
    if covered != num_bytes:
        return None
    return tuple(Extent(file=file, offset=offset, nbytes=length, into=into) for into, file, offset, length in merged)


def _first_contiguous_dim(box: Box, into_stride: Shape) -> int:
    """The dimension from which on a box is one run, in the file as in the tensor."""
    dim, length = len(box.size), 1
    while dim and (box.size[dim - 1] == 1 or box.stride[dim - 1] == into_stride[dim - 1] == length):
        dim -= 1
        length *= box.size[dim]
    return dim


def _row_major(shape: Shape) -> Shape:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _dot(index: Sequence[int], stride: Sequence[int]) -> int:
    return sum(i * s for i, s in zip(index, stride, strict=False))


# --- Boxes cropped, turned and reshaped


def _replaced(box: Box, base: int, first: int, last: int, dims: Sequence[tuple[int, int, int]]) -> Box:
    """`box` from element `base` on, with (start, size, stride) of `dims` in place of its dimensions [first, last)."""
    parts = zip(box[2:], zip(*dims, strict=True) if dims else ((), (), ()), strict=True)
    return Box(box.spec, base, *((*old[:first], *new, *old[last:]) for old, new in parts))


def _cropped(boxes: Iterable[Box], dim: int, start: int, stop: int) -> Boxes:
    """What is left of `boxes` between `start` and `stop` of one dimension, counted from `start`."""
    kept = []
    for box in boxes:
        low, high = max(box.start[dim], start), min(box.start[dim] + box.size[dim], stop)
        if low < high:
            stride = box.stride[dim]
            base = box.base + (low - box.start[dim]) * stride
            kept.append(_replaced(box, base, dim, dim + 1, [(low - start, high - low, stride)]))
    return tuple(kept)


def _permuted(boxes: Boxes, order: Sequence[int]) -> Boxes:
    return tuple(Box(box.spec, box.base, *(tuple(part[dim] for dim in order) for part in box[2:])) for box in boxes)


def _reshaped(boxes: Boxes, old: Shape, new: Shape) -> Boxes | None:
    """`boxes` of a tensor of shape `old` whose elements, in row-major order, are given the shape `new`.

    Dimensions are taken in groups of equal product; each group is merged into one dimension and split again. A box that
    a border cuts becomes several; None where they become too many.
    """
    if not boxes or old == new:
        return boxes
    for merge, split in _groups(old, new):
        steps: list[Callable[[Box], Iterable[Box]]] = []
        at = split.start  # where the group begins, now that the groups before it are done
        if not merge:
            steps.append(lambda box, at=at: [_replaced(box, box.base, at, at, [(0, 1, 0)])])  # type: ignore[misc]
        for dim in merge[1:]:
            steps.append(lambda box, at=at, dim=dim: _merge_dims(box, at, old[dim]))  # type: ignore[misc]
        for dim in split[:-1]:
            inner = math.prod(new[dim + 1 : split.stop])
            steps.append(lambda box, dim=dim, inner=inner: _split_dim(box, dim, inner))  # type: ignore[misc]
        if not split:
            steps.append(lambda box, at=at: [_replaced(box, box.base, at, at + 1, [])])  # type: ignore[misc]
        for step in steps:
            boxes = tuple(itertools.chain.from_iterable(map(step, boxes)))
            if len(boxes) > _MAX_BOXES:
                return None
    return boxes


def _groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Ranges of dimensions of `old` and of `new` that hold the same number of elements, from the left."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        have, want = old[i], new[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have, i = have * old[i], i + 1
            else:
                want, j = want * new[j], j + 1
        groups.append((range(first_i, i), range(first_j, j)))
    groups.extend((range(dim, dim + 1), range(j, j)) for dim in range(i, len(old)))  # ones that vanish
    groups.extend((range(i, i), range(dim, dim + 1)) for dim in range(j, len(new)))  # ones that appear
    return groups


def _merge_dims(box: Box, dim: int, inner: int) -> Iterable[Box]:
    """Dimensions `dim` and `dim + 1` (of extent `inner`) as one."""
    (a, b), (x, y), (s, t) = (part[dim : dim + 2] for part in box[2:])
    if inner == 1:
        merged = [(0, a, x, s)]
    elif x == 1:
        merged = [(0, a * inner + b, y, t)]
    elif y == inner and s == y * t:
        merged = [(0, a * inner, x * y, t)]
    else:
        merged = [(i * s, (a + i) * inner + b, y, t) for i in range(x)]
    return [_replaced(box, box.base + skip, dim, dim + 2, [one]) for skip, *one in merged]  # type: ignore[list-item]


def _split_dim(box: Box, dim: int, inner: int) -> Iterable[Box]:
    """Dimension `dim` as two, the second of extent `inner`: up to a partial row, whole rows, and a partial row."""
    start, size, stride = (part[dim] for part in box[2:])
    head = min(size, -start % inner)
    body = (size - head) // inner * inner
    for skip, length in ((0, head), (head, body), (head + body, size - head - body)):
        if length:
            row, column = divmod(start + skip, inner)
            rows, columns = (length // inner, inner) if length >= inner else (1, length)
            two = [(row, rows, stride * inner), (column, columns, stride)]
            yield _replaced(box, box.base + skip * stride, dim, dim + 1, two)


# --- The operations that move elements and do nothing else


def _keep(move: Move) -> list[Boxes | None]:
    return [move.placed[0][0]]


def _pad(move: Move) -> list[Boxes | None]:
    return [None if any(move.args[1]) else move.placed[0][0]]


def _reshape(move: Move) -> list[Boxes | None]:
    return [_reshaped(*move.placed[0], move.outs[0])]


def _view(move: Move) -> list[Boxes | None]:
    # `view` may also read the bytes as another dtype, which no box can say
    return [None] if isinstance(move.args[1], torch.dtype) else _reshape(move)


def _slice(move: Move) -> list[Boxes | None]:
    (boxes, shape), dim = move.placed[0], move.dim()
    bounds = slice(move.argument(2, "start"), move.argument(3, "end"), move.argument(4, "step"))
    start, stop, step = bounds.indices(shape[dim])
    return [_cropped(boxes, dim, start, stop) if step == 1 else None]


def _select(move: Move) -> list[Boxes | None]:
    (boxes, shape), dim = move.placed[0], move.dim()
    index = move.args[2] % shape[dim]
    return [_reshaped(_cropped(boxes, dim, index, index + 1), _one_at(shape, dim), move.outs[0])]


def _split(move: Move) -> list[Boxes | None]:
    boxes, dim = move.placed[0][0], move.dim(2)
    stops = itertools.accumulate(out[dim] for out in move.outs)
    return [_cropped(boxes, dim, stop - out[dim], stop) for out, stop in zip(move.outs, stops, strict=True)]


def _unbind(move: Move) -> list[Boxes | None]:
    (boxes, shape), dim = move.placed[0], move.dim()
    by_index: list[list[Box]] = [[] for _ in move.outs]
    for box in boxes:  # each box once: a stack of hundreds of experts has hundreds of both
        for index in range(box.start[dim], box.start[dim] + box.size[dim]):
            by_index[index].extend(_cropped([box], dim, index, index + 1))
    return [_reshaped(tuple(found), _one_at(shape, dim), out) for found, out in zip(by_index, move.outs, strict=True)]


def _permute(move: Move) -> list[Boxes | None]:
    boxes, shape = move.placed[0]
    return [_permuted(boxes, [dim % len(shape) for dim in move.args[1]])]


def _transpose(move: Move) -> list[Boxes | None]:
    boxes, shape = move.placed[0]
    order = list(range(len(shape)))
    if order:
        one, other = (dim % len(shape) for dim in (move.args[1:3] or (0, -1)))
        order[one], order[other] = order[other], order[one]
    return [_permuted(boxes, order)]


def _cat(move: Move) -> list[Boxes | None]:
    rank = len(move.outs[0])
    dim = move.argument(1, "dim", 0) % rank
    boxes: list[Box] = []
    offset = 0
    for pieces, shape in move.placed:
        if len(shape) != rank:
            continue  # torch lets an empty vector join anything
        for box in pieces:
            moved = (box.start[dim] + offset, box.size[dim], box.stride[dim])
            boxes.append(_replaced(box, box.base, dim, dim + 1, [moved]))
        offset += shape[dim]
    return [tuple(boxes)]


def _stack(move: Move) -> list[Boxes | None]:
    dim = move.argument(1, "dim", 0) % len(move.outs[0])
    return [
        tuple(
            _replaced(box, box.base, dim, dim, [(index, 1, 0)])
            for index, (pieces, _) in enumerate(move.placed)
            for box in pieces
        )
    ]


def _one_at(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], 1, *shape[dim + 1 :])


_aten = torch.ops.aten

# Any other operation counts as arithmetic: exact too, but by computing it.
MOVERS: dict[Any, Callable[[Move], list[Boxes | None]]] = {
    **dict.fromkeys((_aten.detach, _aten.alias, _aten.clone, _aten._to_copy, _aten.lift_fresh), _keep),
    **dict.fromkeys((_aten.unsqueeze, _aten.squeeze, _aten._unsafe_view, _aten._reshape_alias), _reshape),
    **dict.fromkeys((_aten.split, _aten.split_with_sizes), _split),
    **dict.fromkeys((_aten.transpose, _aten.t), _transpose),
    _aten.constant_pad_nd: _pad,
    _aten.view: _view,
    _aten.slice: _slice,
    _aten.select: _select,
    _aten.unbind: _unbind,
    _aten.permute: _permute,
    _aten.cat: _cat,
    _aten.stack: _stack,
}
