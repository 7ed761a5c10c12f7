"""What a store is: it fills a slot with a unit's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory
from bigmodel.offload.reader import Ticket

__all__ = ["Store", "Tiers"]


class Store(Protocol):
    """Where streamed units rest. Three methods; latency and failure are stores too, in the tests."""

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        """Begin to fill `slot` with the unit's weights, laid out as its layout says.

        Args:
            unit: the unit's name.
            slot: host memory, not touched by anyone until the ticket is done; or an accelerator's, after whose event `after`
                nothing reads it.
            is_urgent: the computation waits for it: it goes before all prefetches.
        """

    def read_bytes(self, unit: str) -> int:
        """Bytes that one fetch of the unit reads."""

    def close(self) -> None:
        """Stop; nothing writes into a slot after this returns."""


class Tiers:
    """Several stores as one: each unit is in one of them.

    Args:
        store_of: unit name -> its store.
    """

    def __init__(self, store_of: Mapping[str, Store]) -> None:
        self._store_of = dict(store_of)

    def fetch(self, unit: str, slot: Arena | DeviceMemory, *, is_urgent: bool) -> Ticket:
        return self._store_of[unit].fetch(unit, slot, is_urgent=is_urgent)

    def read_bytes(self, unit: str) -> int:
        return self._store_of[unit].read_bytes(unit)

    def close(self) -> None:
        for store in _each_once(self._store_of.values()):
            store.close()


def _each_once(stores: Iterable[Store]) -> list[Store]:
    return list({id(store): store for store in stores}.values())
