"""Weights that accelerators run: put where they rest, on the device or in host memory from where they are copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bigmodel.checkpoint.spec import Source
from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.converted import run_conversion
from bigmodel.offload.direct import DirectReads
from bigmodel.offload.link import RING_BYTES, DeviceMemory, Link, page_lock
from bigmodel.offload.ranges import PACKED_ALIGN_BYTES, Layout
from bigmodel.offload.reader import Reader, Ticket, layout_of
from bigmodel.offload.spill import trim_heap
from bigmodel.progress import Report
from bigmodel.units import format_bytes

__all__ = ["Crossing", "Traveller"]

logger = logging.getLogger("bigmodel.offload")

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Traveller:
    """A unit that an accelerator runs.

    Attributes:
        name: of the unit.
        sources: of its parameters.
        link: to the accelerator.
        stays_on_host: whether it rests in host memory and is fetched for each use; otherwise it rests on the accelerator.
    """

    name: str
    sources: Sequence[Source]
    link: Link
    stays_on_host: bool


@dataclass(frozen=True, slots=True)
class _Slab:
    """Where one of them goes: its layout, and bytes for what is converted behind it."""

    unit: Traveller
    layout: Layout
    places: Mapping[str, int]
    nbytes: int

    @property
    def lead(self) -> int:
        return self.layout.lead


class Crossing:
    """Begins to read when it is made; `finish` gives the tensors.

    All that rests in host memory is one page-locked arena; each unit in it is as its slot will be, so that one copy does. Where
    page-locking is refused a warning says so.

    Args:
        units: what accelerators run and does not rest on disk.
        reader: with a ring, where something rests on an accelerator.
        direct: reads what is converted.
        progress: called with (phase, done bytes, total bytes).

    Attributes:
        slabs: unit name -> uint8 tensor of host memory, for those that rest there.
        places: unit name -> parameter name -> first byte in the unit's slab.
        host_bytes: of all of them.
        needs_ring: whether they must be copied through the ring, because page-locking was refused.
    """

    def __init__(
        self, units: Sequence[Traveller], *, reader: Reader, direct: DirectReads, progress: Report | None = None
    ) -> None:
        self._direct = direct
        self._progress = progress
        self._slabs = [_slab(unit) for unit in units]
        self._memory: dict[str, torch.Tensor] = {}
        self._tickets: list[tuple[_Slab, Ticket]] = []
        self.slabs: dict[str, torch.Tensor] = {}
        self.places: dict[str, dict[str, int]] = {}
        on_host = [slab for slab in self._slabs if slab.unit.stays_on_host]
        self.host_bytes = sum(slab.nbytes for slab in on_host)
        # What goes on to accelerators is read while the host's memory is page-locked, which touches all of it.
        for slab in self._slabs:
            if not slab.unit.stays_on_host:
                memory = DeviceMemory(slab.nbytes - slab.lead, slab.unit.link)
                self._memory[slab.unit.name] = memory.tensor
                self._tickets.append((slab, reader.submit(slab.unit.name, slab.layout, memory)))
        arena = Arena(self.host_bytes)
        self.needs_ring = bool(on_host) and not _is_locked(arena, on_host[0].unit.link.device)
        at_byte = 0
        for slab in on_host:
            name = slab.unit.name
            self._memory[name] = arena.tensor[at_byte : at_byte + slab.nbytes]
            self.slabs[name] = self._memory[name][slab.lead :]
            self.places[name] = {source: place - slab.lead for source, place in slab.places.items()}
            self._tickets.append((slab, reader.submit(name, slab.layout, arena, at_byte=at_byte)))
            at_byte += slab.nbytes

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for the reads, convert what needs it, and return parameter name -> tensor, where it rests.

        Raises:
            ReadError: a file could not be read, or changed since its header was checked.
        """
        tensors: dict[str, torch.Tensor] = {}
        total, done = sum(slab.layout.read_bytes for slab in self._slabs), 0
        with torch.inference_mode(False), torch.no_grad():
            for slab, ticket in self._tickets:
                while not ticket.done.wait(_POLL_S):
                    self._report(done, total)
                ticket.wait()
                done += slab.layout.read_bytes
                self._report(done, total)
                if ticket.filled is not None:
                    slab.unit.link.wait(ticket.filled)
                memory = self._memory[slab.unit.name]
                lead = 0 if slab.unit.stays_on_host else slab.lead
                for source in slab.unit.sources:
                    start = slab.places[source.name] - lead
                    flat = memory[start : start + source.nbytes]
                    tensors[source.name] = flat.view(source.dtype).view(source.shape)
            self._convert(tensors)
        for link in {slab.unit.link for slab in self._slabs}:
            link.drain()  # the ring may go, and every stream find the weights there
        return tensors

    def _report(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress("reading weights", done, total)

    def _convert(self, tensors: Mapping[str, torch.Tensor]) -> None:
        waiting = {
            source.name: source for slab in self._slabs for source in slab.unit.sources if source.conversion is not None
        }
        while waiting:
            first = next(iter(waiting.values()))
            assert first.conversion is not None
            outputs = run_conversion(first.conversion, self._direct.stored)
            for name in list(outputs):
                source = waiting.pop(name, None)
                if source is not None:
                    tensors[name].copy_(outputs[name].to(source.dtype).reshape(source.shape))
            del outputs
            trim_heap()


def _is_locked(arena: Arena, device: torch.device) -> bool:
    error = page_lock(arena, device)
    if error:
        logger.warning(
            "%s of host memory could not be page-locked (CUDA error %d): at each use, weights are copied through %s of buffers "
            "on their way to %s, which takes processor time and memory bandwidth. Raise the limit on locked memory (ulimit -l), "
            "or state less max_memory['cpu'].",
            format_bytes(arena.nbytes),
            error,
            format_bytes(RING_BYTES),
            device,
        )
    return not error


def _slab(unit: Traveller) -> _Slab:
    layout = layout_of(unit.sources, for_accelerator=True)
    places, end = dict(layout.places), layout.nbytes
    for source in unit.sources:
        if source.conversion is not None:
            end = layout.lead + _round_up(end - layout.lead, PACKED_ALIGN_BYTES)
            places[source.name] = end
            end += source.nbytes
    return _Slab(unit, layout, places, _round_up(end, ALIGN_BYTES))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
