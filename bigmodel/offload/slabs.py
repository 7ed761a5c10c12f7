"""Host memory in which units rest just as an accelerator will have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory
from bigmodel.offload.reader import Ticket

__all__ = ["SlabStore"]


class SlabStore:
    """Copies units from host memory into an accelerator's slots: one copy each, which the host does not wait for.

    Args:
        slabs: unit name -> uint8 tensor on the host, as its slot begins; not longer than the slot.
    """

    def __init__(self, slabs: Mapping[str, torch.Tensor]) -> None:
        self._slabs = dict(slabs)

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        assert isinstance(slot, DeviceMemory)
        slab = self._slabs[unit]
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
        pass
