"""What a store is: it fills a slot with a unit's weights."""

from __future__ import annotations

from typing import Protocol

from bigmodel.offload.arena import Arena
from bigmodel.offload.reader import Ticket

__all__ = ["Store"]


class Store(Protocol):
    """Where streamed units rest. Three methods; latency and failure are stores too, in the tests."""

    def fetch(self, unit: str, slot: Arena, *, is_urgent: bool) -> Ticket:
        """Begin to fill `slot` with the unit's weights, laid out as its layout says.

        Args:
            unit: the unit's name.
            slot: host memory, not touched by anyone until the ticket is done.
            is_urgent: the computation waits for it: it goes before all prefetches.
        """

    def read_bytes(self, unit: str) -> int:
        """Bytes that one fetch of the unit reads."""

    def close(self) -> None:
        """Stop; nothing writes into a slot after this returns."""
