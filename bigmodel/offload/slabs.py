"""Host memory in which units rest just as an accelerator will have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory
from bigmodel.offload.reader import Reader, Ticket

__all__ = ["SlabStore"]


class SlabStore:
    """Copies units from host memory into an accelerator's slots: one copy each, which the host does not wait for.

    Args:
        slabs: unit name -> uint8 tensor on the host, as its slot begins; not longer than the slot.
        reader: its threads copy them through its ring, where they are not page-locked; closed with the store.
    """

    def __init__(self, slabs: Mapping[str, torch.Tensor], reader: Reader | None = None) -> None:
        self._slabs = dict(slabs)
        self._reader = reader

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        assert isinstance(slot, DeviceMemory)
        slab = self._slabs[unit]
        if self._reader is not None:
            return self._reader.submit_copy(unit, slab, slot, is_urgent=is_urgent)
        ticket = Ticket(unit, 0)
        try:
            slot.link.copy(slab, slot.tensor[: slab.numel()], slot.after)
            ticket.filled = slot.link.mark_copied()
        except RuntimeError as error:  # told where the unit is needed, with its name
            ticket.error = error
        ticket.done.set()
        return ticket

    def read_bytes(self, unit: str) -> int:
        return 0

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
