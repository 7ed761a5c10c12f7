"""The disk tier: units stream from the checkpoint's own files."""

from __future__ import annotations

from collections.abc import Mapping

from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory
from bigmodel.offload.ranges import Layout
from bigmodel.offload.reader import Reader, Ticket

__all__ = ["DiskStore"]


class DiskStore:
    """Reads units from files into slots.

    Args:
        reader: the threads; closed with the store.
        layouts: unit name -> its layout in a slot.
    """

    def __init__(self, reader: Reader, layouts: Mapping[str, Layout]) -> None:
        self._reader = reader
        self._layouts = layouts

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        return self._reader.submit(unit, self._layouts[unit], slot, is_urgent=is_urgent)

    def read_bytes(self, unit: str) -> int:
        return self._layouts[unit].read_bytes

    def close(self) -> None:
        self._reader.close()
