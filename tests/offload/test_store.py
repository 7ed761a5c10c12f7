"""What every store must do, whatever is behind it: the streamer relies on nothing else."""

import os

import pytest
import torch
from toy import UNIT_BYTES, MemoryStore

from bigmodel.checkpoint.spec import Extent, Source
from bigmodel.errors import ReadError
from bigmodel.offload.arena import ALIGN_BYTES, Arena
from bigmodel.offload.disk import DiskStore
from bigmodel.offload.ranges import lay_out
from bigmodel.offload.reader import Reader

SLOT_BYTES = ALIGN_BYTES  # room for a unit, whole blocks
UNITS = ("blocks.0", "blocks.1", "blocks.2")


class StoreContract:
    """Inherited by the tests of each store, which say how one is made and broken."""

    @pytest.fixture
    def content(self):
        torch.manual_seed(0)
        return {unit: torch.randint(0, 256, (UNIT_BYTES,), dtype=torch.uint8) for unit in UNITS}

    @pytest.fixture
    def store(self, content, tmp_path):
        made = self.make(content, tmp_path)
        yield made
        made.close()

    def test_a_fetch_fills_the_slot_with_the_unit(self, store, content):
        slot = Arena(SLOT_BYTES)
        for unit in (*UNITS, UNITS[0]):
            slot.tensor.fill_(7)
            store.fetch(unit, slot, is_urgent=False).wait()
            assert torch.equal(slot.tensor[:UNIT_BYTES], content[unit])

    def test_fetches_under_way_do_not_mix(self, store, content):
        slots = [Arena(SLOT_BYTES) for _ in range(12)]
        wanted = [UNITS[number % 3] for number in range(12)]
        tickets = [
            store.fetch(unit, slot, is_urgent=n % 5 == 4)
            for n, (unit, slot) in enumerate(zip(wanted, slots, strict=True))
        ]
        for ticket in reversed(tickets):
            ticket.wait()
            assert ticket.done.is_set()
        assert all(
            torch.equal(slot.tensor[:UNIT_BYTES], content[unit]) for unit, slot in zip(wanted, slots, strict=True)
        )

    def test_a_fetch_reads_at_least_what_it_fills(self, store):
        assert all(store.read_bytes(unit) >= UNIT_BYTES for unit in UNITS)

    def test_an_error_is_its_tickets_alone_and_names_the_unit(self, store, content, tmp_path):
        slots = [Arena(SLOT_BYTES) for _ in UNITS]
        self.break_unit(store, UNITS[1], tmp_path)
        tickets = [store.fetch(unit, slot, is_urgent=False) for unit, slot in zip(UNITS, slots, strict=True)]
        with pytest.raises(ReadError, match=r"blocks\.1 could not be read"):
            tickets[1].wait()
        tickets[0].wait()
        tickets[2].wait()
        assert torch.equal(slots[0].tensor[:UNIT_BYTES], content[UNITS[0]])
        assert torch.equal(slots[2].tensor[:UNIT_BYTES], content[UNITS[2]])

    def test_nothing_writes_into_a_slot_after_close(self, store):
        slots = [Arena(SLOT_BYTES) for _ in range(30)]
        tickets = [store.fetch(UNITS[number % 3], slot, is_urgent=False) for number, slot in enumerate(slots)]
        store.close()
        before = [slot.tensor.clone() for slot in slots]
        assert all(ticket.done.is_set() for ticket in tickets)
        assert all(torch.equal(slot.tensor, old) for slot, old in zip(slots, before, strict=True))


class TestMemoryStore(StoreContract):
    """The one that the streamer's tests use, fast and slow."""

    @staticmethod
    def make(content, tmp_path):
        return MemoryStore(content, delay_s=0.002)

    @staticmethod
    def break_unit(store, unit, tmp_path):
        store.broken.add(unit)


class TestDiskStore(StoreContract):
    @staticmethod
    def make(content, tmp_path):
        layouts = {}
        for unit, raw in content.items():
            file = tmp_path / f"{unit}.bin"
            file.write_bytes(raw.numpy().tobytes())
            source = Source("w", torch.uint8, (UNIT_BYTES,), torch.uint8, (Extent(str(file), 0, UNIT_BYTES, 0),))
            layouts[unit] = lay_out([source], block_bytes=ALIGN_BYTES, gap_bytes=0)
        return DiskStore(Reader(num_threads=3, stamps={}), layouts)

    @staticmethod
    def break_unit(store, unit, tmp_path):
        os.truncate(tmp_path / f"{unit}.bin", UNIT_BYTES // 2)
