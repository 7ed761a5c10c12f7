"""Arithmetic of reads: which bytes of which files go where in a slab. Pure functions; every knob is an argument.

A slab is a piece of host memory that holds a group of parameters: one unit (in a slot), or everything that stays resident.
Parameters whose bytes stand in a file as they are keep the file's alignment: neighbours are read together, in one long
aligned range, so that a direct read can put them straight where they belong, and a parameter has the same address modulo
ALIGN_BYTES in every slab and in a map of the file (on some CPUs the last bits of a matrix product depend on it).
For an accelerator every parameter begins at a multiple of PACKED_ALIGN_BYTES of its slot, as where its allocator had made it
(which kernel a product takes depends on it); its slab in host memory is the same bytes behind a `lead`, so that one copy does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.offload.arena import ALIGN_BYTES

__all__ = ["PACKED_ALIGN_BYTES", "Block", "Layout", "lay_out"]

# Parameters that are put together or cast start here; the same in every slab.
PACKED_ALIGN_BYTES = 256


@dataclass(frozen=True, slots=True)
class Block:
    """One read: bytes of a file and where they go in a slab.

    Attributes:
        file: absolute path.
        offset, nbytes: the range of the file; aligned when `cast_from` is None and `is_aligned`.
        needed: bytes of the range that must come; what is past them may lie past the file's end.
        into: first byte in the slab (in the destination's dtype where there is a cast).
        is_aligned: offset, nbytes and into are multiples of ALIGN_BYTES: a direct read can go straight in.
        cast_from, cast_to: dtypes of a cast on the way, or None.
    """

    file: str
    offset: int
    nbytes: int
    needed: int
    into: int
    is_aligned: bool
    cast_from: torch.dtype | None = None
    cast_to: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a group's parameters lie in a slab, and the reads that fill it.

    Attributes:
        nbytes: size of the slab.
        places: parameter name -> first byte in the slab.
        blocks: the reads, in file order.
        read_bytes: bytes that one filling reads from files.
        staging_bytes: size of the bounce buffer that the largest indirect read needs, 0 if all go straight in.
        num_runs: ranges of files that are read straight into place.
        lead: bytes of the slab before the first parameter, which an accelerator's slot leaves out.
    """

    nbytes: int
    places: dict[str, int]
    blocks: tuple[Block, ...]
    read_bytes: int
    staging_bytes: int
    num_runs: int
    lead: int = 0

    @property
    def device_bytes(self) -> int:
        """Size of an accelerator's slot that holds it."""
        return self.nbytes - self.lead

    @property
    def device_places(self) -> dict[str, int]:
        """Parameter name -> first byte in an accelerator's slot."""
        return {name: max(0, place - self.lead) for name, place in self.places.items()}


def lay_out(sources: Iterable[Source], *, block_bytes: int, gap_bytes: int, for_accelerator: bool = False) -> Layout:
    """Lay out parameters in one slab.

    Args:
        sources: parameters without a conversion.
        block_bytes: longest single read; a multiple of ALIGN_BYTES.
        gap_bytes: two ranges of a file at most this far apart are read as one (the gap is read too and wasted).
        for_accelerator: whether the slab is copied to an accelerator, with alignment of its own.

    Returns:
        The layout. Ranges that several parameters share are read once.
    """
    in_place: list[Source] = []
    packed: list[Source] = []
    places: dict[str, int] = {}
    for source in sources:
        if source.conversion is not None:
            raise ValueError(f"{source.name} needs a conversion; it cannot be laid out from ranges")
        if source.nbytes == 0:
            places[source.name] = 0
        else:
            (in_place if source.is_view else packed).append(source)

    blocks: list[Block] = []
    end = lead = 0
    runs = _runs(in_place, gap_bytes, step=PACKED_ALIGN_BYTES if for_accelerator else 1)
    if for_accelerator:
        lead, runs, others = _aligned_alike(
            runs, max((source.dtype.itemsize for source in in_place + packed), default=1)
        )
        packed += others
    for run in runs:
        first = _begin(run)
        start = first - first % ALIGN_BYTES
        last = max(source.extents[0].offset + source.nbytes for source in run)
        for source in run:
            places[source.name] = end + source.extents[0].offset - start
        for offset in range(start, last, block_bytes):
            needed = min(block_bytes, last - offset)
            blocks.append(
                Block(
                    run[0].extents[0].file, offset, _round_up(needed, ALIGN_BYTES), needed, end + offset - start, True
                )
            )
        end += _round_up(last - start, ALIGN_BYTES)

    indirect: list[Block] = []
    for source in packed:
        end = _round_up(max(end - lead, 0), PACKED_ALIGN_BYTES) + lead
        places[source.name] = end
        indirect += _packed_blocks(source, end, block_bytes)
        end += source.nbytes
    indirect.sort(key=lambda block: (block.file, block.offset))
    # A bounce buffer takes the aligned range around the wanted one.
    staging = max((block.nbytes for block in indirect), default=0)
    blocks += indirect
    return Layout(
        nbytes=_round_up(end, ALIGN_BYTES),
        places=places,
        blocks=tuple(blocks),
        read_bytes=sum(block.nbytes for block in blocks),
        staging_bytes=staging + 2 * ALIGN_BYTES if staging else 0,
        num_runs=len(runs),
        lead=lead,
    )


def _packed_blocks(source: Source, start: int, block_bytes: int) -> list[Block]:
    """Reads of a parameter that is put together from several ranges, or cast."""
    stored, dtype = source.stored_dtype, source.dtype
    cast_from, cast_to = (stored, dtype) if stored != dtype else (None, None)
    blocks = []
    for extent in source.extents:
        # Cast, a block is at most twice as large.
        step = (
            min(block_bytes, max(1, 2 * block_bytes // dtype.itemsize) * stored.itemsize) if cast_from else block_bytes
        )
        for done in range(0, extent.nbytes, step):
            nbytes = min(step, extent.nbytes - done)
            into = (extent.into + done) // stored.itemsize * dtype.itemsize if cast_from else extent.into + done
            blocks.append(
                Block(extent.file, extent.offset + done, nbytes, nbytes, start + into, False, cast_from, cast_to)
            )
    return blocks


def _aligned_alike(runs: Sequence[list[Source]], itemsize: int) -> tuple[int, list[list[Source]], list[Source]]:
    """(lead, runs that are multiples of PACKED_ALIGN_BYTES behind it, parameters of the others, which go through a buffer).

    Args:
        runs: in file order.
        itemsize: that the lead must be a multiple of, so that every dtype can be viewed behind it.
    """
    leads = [_begin(run) % ALIGN_BYTES for run in runs]
    number = next((n for n, lead in enumerate(leads) if lead % itemsize == 0), None)
    if number is None:
        return 0, [], [source for run in runs for source in run]
    lead = leads[number]
    alike = [n for n, each in enumerate(leads) if (each - lead) % PACKED_ALIGN_BYTES == 0]
    others = [source for n, run in enumerate(runs) if n not in alike for source in run]
    return lead, [runs[number], *(runs[n] for n in alike if n != number)], others


def _begin(run: Sequence[Source]) -> int:
    return run[0].extents[0].offset


def _runs(sources: Sequence[Source], gap_bytes: int, *, step: int) -> list[list[Source]]:
    """Groups of parameters that are read together, in file order; those of a group are multiples of `step` apart."""
    runs: list[list[Source]] = []
    end = -math.inf
    for source in sorted(sources, key=lambda s: (s.extents[0].file, s.extents[0].offset, s.nbytes)):
        extent = source.extents[0]
        is_near = bool(runs) and runs[-1][0].extents[0].file == extent.file and extent.offset - end <= gap_bytes
        if is_near and (extent.offset - _begin(runs[-1])) % step == 0:
            runs[-1].append(source)
            end = max(end, extent.offset + extent.nbytes)
        else:
            runs.append([source])
            end = extent.offset + extent.nbytes
    return runs


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
