"""Weights that stay in host memory: read at load, in file order, straight into where they stay."""

from __future__ import annotations

import bisect
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from bigmodel.checkpoint.spec import Extent, Source, TensorSpec
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.offload import page_cache
from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.converted import run_conversion
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.file_map import FileMap
from bigmodel.offload.ranges import PACKED_ALIGN_BYTES, lay_out
from bigmodel.offload.reader import BLOCK_BYTES, Reader, Ticket
from bigmodel.offload.spill import trim_heap
from bigmodel.progress import Report

__all__ = ["ResidentLoad", "tensor_at"]

NUM_READERS = 4
# A file is used where it lies in the page cache if nearly all of it is there (systems reclaim a few pages at any time).
_WARM_FRACTION = 0.95
_POLL_S = 0.05
# What streams lies between what stays, and must not be read for a gap's sake: a gap that costs no more than two roundings.
_GAP_BYTES = 2 * ALIGN_BYTES
# Files are kept as they were read if at least this part of them is used.
_USED_FRACTION = 0.99


class ResidentLoad:
    """Begins to read weights when it is made; `finish` gives the tensors.

    Weights come to rest in one of two ways: in private memory, or, where their file lies whole in the page cache and
    memory is plentiful, as a map of the file, which costs nothing to make. A mapped weight may be evicted and read again.

    Args:
        sources: what to load.
        stamps: of their files.
        may_map: whether a warm file may be mapped.
        progress: called with (phase, done bytes, total bytes).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        stamps: Mapping[str, FileStamp],
        may_map: bool,
        progress: Report | None = None,
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._direct = DirectReads(stamps)
        self._progress = progress
        warm = _warm_files(sources) if may_map else set()
        maps = {file: FileMap(file, stamp=stamps.get(file)) for file in warm}
        self._tensors: dict[str, torch.Tensor] = {}
        plain: list[Source] = []
        converted_bytes = 0
        for source in sources:
            if source.conversion is not None:
                converted_bytes += source.nbytes + PACKED_ALIGN_BYTES
            elif source.is_view and source.extents[0].file in warm:
                self._tensors[source.name] = maps[source.extents[0].file].view(source)
            else:
                plain.append(source)
        self.mapped_bytes = sum(tensor.nbytes for tensor in self._tensors.values())
        self._layout = lay_out(plain, block_bytes=BLOCK_BYTES, gap_bytes=_GAP_BYTES)
        self._arena = Arena(self._layout.nbytes + converted_bytes)
        self.private_bytes = self._arena.nbytes
        self._reader: Reader | None = None
        self._ticket: Ticket | None = None
        if self._layout.blocks:
            self._reader = Reader(num_threads=NUM_READERS, stamps=stamps, bounce_bytes=self._layout.staging_bytes)
            self._ticket = self._reader.submit("the resident weights", self._layout, self._arena)
            self._finalizer = weakref.finalize(self, _stop, self._reader, self._ticket)

    @classmethod
    def of_files(
        cls,
        specs: Iterable[TensorSpec],
        *,
        stamps: Mapping[str, FileStamp],
        may_map: bool = True,
        progress: Report | None = None,
    ) -> ResidentLoad:
        """Begin to read whole files, before it is known which parameter is which: `give` tells them apart later."""
        sources = [
            Source(spec.name, spec.dtype, spec.shape, spec.dtype, (Extent(spec.file, spec.offset, spec.nbytes, 0),))
            for spec in specs
            if spec.nbytes
        ]
        return cls(sources, stamps=stamps, may_map=may_map, progress=progress)

    def can_give(self, wanted: Sequence[Source], *, is_exact: bool) -> bool:
        """Whether these parameters stand in what is being read just as they are, and nothing (or hardly anything) else does."""
        ranges = self._ranges()
        if not all(source.nbytes == 0 or (source.is_view and _holder(ranges, source)) for source in wanted):
            return False
        used = sum({source.extents[0]: source.nbytes for source in wanted if source.nbytes}.values())
        return used >= (1 if is_exact else _USED_FRACTION) * sum(source.nbytes for source in self._sources.values())

    def give(self, wanted: Sequence[Source]) -> dict[str, torch.Tensor]:
        """`finish`, under other names and shapes: parameter name -> CPU tensor, for sources that `can_give` agreed to."""
        ranges = self._ranges()
        tensors = self.finish()
        given: dict[str, torch.Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for source in wanted:
                if source.nbytes == 0:
                    given[source.name] = torch.empty(source.shape, dtype=source.dtype)
                    continue
                holder = _holder(ranges, source)
                assert holder is not None
                at_byte = source.extents[0].offset - holder.extents[0].offset
                flat = tensors[holder.name].reshape(-1).view(torch.uint8)[at_byte : at_byte + source.nbytes]
                given[source.name] = flat.view(source.dtype).view(source.shape)
        return given

    def _ranges(self) -> dict[str, list[Source]]:
        """File -> what is read from it, by place."""
        ranges: dict[str, list[Source]] = {}
        for source in self._sources.values():
            ranges.setdefault(source.extents[0].file, []).append(source)
        for sources in ranges.values():
            sources.sort(key=lambda source: source.extents[0].offset)
        return ranges

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for the reads, convert what needs it, and return parameter name -> CPU tensor.

        Raises:
            ReadError: a file could not be read, or changed since its header was checked.
        """
        try:
            self._convert()
            if self._ticket is not None:
                self._wait(self._ticket)
            with torch.inference_mode(False), torch.no_grad():
                for name, at_byte in self._layout.places.items():
                    self._tensors[name] = tensor_at(self._arena, at_byte, self._sources[name])
        finally:
            self.close()
        return self._tensors

    def close(self) -> None:
        """Stop reading. What was read is freed with this object."""
        if self._reader is not None:
            self._finalizer()  # also called where nobody closes: an interrupt before anybody could
            self._reader = None

    def _wait(self, ticket: Ticket) -> None:
        total, num_blocks = self._layout.read_bytes, len(self._layout.blocks)
        while not ticket.done.wait(_POLL_S):
            if self._progress is not None:
                self._progress("reading weights", total * (num_blocks - ticket.num_left) // num_blocks, total)
        ticket.wait()
        if self._progress is not None:
            self._progress("reading weights", total, total)

    def _convert(self) -> None:
        at_byte = self._layout.nbytes
        waiting = {name: source for name, source in self._sources.items() if source.conversion is not None}
        total, done = sum(source.nbytes for source in waiting.values()), 0
        while waiting:
            if self._progress is not None:
                self._progress("converting weights", done, total)
            first = next(iter(waiting.values()))
            assert first.conversion is not None
            outputs = run_conversion(first.conversion, self._direct.stored)
            for name in list(outputs):
                source = waiting.pop(name, None)
                if source is None:
                    continue
                tensor = tensor_at(self._arena, at_byte, source)
                with torch.no_grad():
                    tensor.copy_(outputs[name].reshape(source.shape))
                self._tensors[name] = tensor
                done += source.nbytes
                at_byte += -(-source.nbytes // PACKED_ALIGN_BYTES) * PACKED_ALIGN_BYTES
            del outputs  # before the next one's are made
            trim_heap()


def _stop(reader: Reader, ticket: Ticket) -> None:
    ticket.cancel()
    reader.close()


def _holder(ranges: Mapping[str, list[Source]], source: Source) -> Source | None:
    """What is read that holds the parameter's range, if anything does."""
    extent = source.extents[0]
    sources = ranges.get(extent.file, [])
    number = bisect.bisect_right(sources, extent.offset, key=lambda each: each.extents[0].offset) - 1
    if number < 0:
        return None
    own = sources[number].extents[0]
    is_inside = extent.offset + extent.nbytes <= own.offset + own.nbytes
    return sources[number] if is_inside and (extent.offset - own.offset) % source.dtype.itemsize == 0 else None


def tensor_at(arena: Arena, at_byte: int, source: Source) -> torch.Tensor:
    """The parameter's tensor over an arena's bytes from `at_byte` on."""
    with torch.inference_mode(False):
        flat = arena.tensor[at_byte : at_byte + source.nbytes]
        return flat.view(source.dtype).view(source.shape)


def _warm_files(sources: Sequence[Source]) -> set[str]:
    """Files that lie in the page cache; judged in parallel, since a large one may take milliseconds."""
    files = list({extent.file for source in sources for extent in source.extents})
    warm: set[str] = set()

    def judge(share: list[str]) -> None:
        for file in share:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fraction = page_cache.cached_fraction(fd, 0, os.fstat(fd).st_size)
                if fraction >= _WARM_FRACTION:
                    warm.add(file)
                    if fraction < 1.0:  # what is missing comes while the model is built
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    with ThreadPoolExecutor(max_workers=NUM_READERS) as threads:
        list(threads.map(judge, (files[number::NUM_READERS] for number in range(min(NUM_READERS, len(files))))))
    return warm
