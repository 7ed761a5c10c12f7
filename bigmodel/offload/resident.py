"""Weights that stay in host memory: read at load, in file order, straight into where they stay."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.offload import page_cache
from bigmodel.offload.arena import Arena
from bigmodel.offload.converted import run_conversion
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.file_map import FileMap
from bigmodel.offload.ranges import PACKED_ALIGN_BYTES, lay_out
from bigmodel.offload.reader import BLOCK_BYTES, GAP_BYTES, FileStamp, Reader, Ticket

__all__ = ["ResidentLoad", "tensor_at"]

logger = logging.getLogger("bigmodel.offload")

NUM_READERS = 4
# A file is used where it lies in the page cache if nearly all of it is there.
_WARM_FRACTION = 0.999
_POLL_S = 0.05


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
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._direct = DirectReads(stamps)
        self._progress = progress
        warm = _warm_files(sources) if may_map else set()
        maps = {file: FileMap(file) for file in warm}
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
        self._layout = lay_out(plain, block_bytes=BLOCK_BYTES, gap_bytes=GAP_BYTES)
        self._arena = Arena(self._layout.nbytes + converted_bytes)
        self.private_bytes = self._arena.nbytes
        self._reader: Reader | None = None
        self._ticket: Ticket | None = None
        if self._layout.blocks:
            self._reader = Reader(num_threads=NUM_READERS, stamps=stamps, bounce_bytes=self._layout.staging_bytes)
            self._ticket = self._reader.submit("the resident weights", self._layout, self._arena)

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
            if self._ticket is not None:
                self._ticket.cancel()
            self._reader.close()
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
        while waiting:
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
                at_byte += -(-source.nbytes // PACKED_ALIGN_BYTES) * PACKED_ALIGN_BYTES


def tensor_at(arena: Arena, at_byte: int, source: Source) -> torch.Tensor:
    """The parameter's tensor over an arena's bytes from `at_byte` on."""
    with torch.inference_mode(False):
        flat = arena.tensor[at_byte : at_byte + source.nbytes]
        return flat.view(source.dtype).view(source.shape)


def _warm_files(sources: Sequence[Source]) -> set[str]:
    """Files that lie whole in the page cache; judged in parallel, since a large one takes milliseconds."""
    files = list({extent.file for source in sources for extent in source.extents})
    warm: set[str] = set()

    def judge(share: list[str]) -> None:
        for file in share:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if page_cache.cached_fraction(fd, 0, os.fstat(fd).st_size) >= _WARM_FRACTION:
                    warm.add(file)
            finally:
                os.close(fd)

    threads = [
        threading.Thread(target=judge, args=(files[i::NUM_READERS],)) for i in range(min(NUM_READERS, len(files)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return warm
