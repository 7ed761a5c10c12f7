"""Reader threads: errors reach whoever waits, a changed file is an error, and nothing is left behind."""

import gc
import os
import threading
from dataclasses import replace

import pytest
import torch
from simulated import COMPILER, simulated

from bigmodel.checkpoint.spec import Extent, Source
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.errors import DoesNotFitError, ReadError, StreamingError
from bigmodel.offload import page_cache
from bigmodel.offload.arena import Arena
from bigmodel.offload.link import DeviceMemory, Link, Ring
from bigmodel.offload.ranges import lay_out
from bigmodel.offload.reader import BLOCK_BYTES, Reader

NBYTES = 3 * (1 << 20) + 123


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(os.urandom(NBYTES + 50))
    return Source("w", torch.uint8, (NBYTES,), torch.uint8, (Extent(str(path), 7, NBYTES, 0),))


def content_of(source, is_cached):
    """Of its file, which is then in the page cache, or not."""
    with open(source.extents[0].file, "rb") as file:
        content = file.read()
        os.fsync(file.fileno())
        if not is_cached:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cached = page_cache.cached_fraction(file.fileno(), 0, len(content))
    if (cached == 1.0) is not is_cached:
        pytest.skip("this file system does not give up its page cache")
    return content


def read(source, stamps=None, block_bytes=1 << 20):
    layout = lay_out([source], block_bytes=block_bytes, gap_bytes=0)
    slab = Arena(layout.nbytes)
    reader = Reader(num_threads=3, stamps=stamps or {}, bounce_bytes=layout.staging_bytes)
    try:
        reader.submit("layers.7", layout, slab).wait()
    finally:
        reader.close()
    return slab.tensor[layout.places["w"] :][: source.nbytes]


@pytest.mark.parametrize("is_cached", [False, True])
def test_direct_and_buffered_reads_give_the_same_bytes(source, is_cached):
    content = content_of(source, is_cached)
    assert read(source).numpy().tobytes() == content[7 : 7 + NBYTES]


@pytest.mark.parametrize("is_cached", [False, True])
def test_what_is_put_together_is_read_around_what_stands_before_it(source, is_cached):
    content = content_of(source, is_cached)
    path = source.extents[0].file
    parts = (Extent(path, 5001, 300, 0), Extent(path, 7, 200, 300))
    assert read(replace(source, shape=(500,), extents=parts)).numpy().tobytes() == content[5001:5301] + content[7:207]


def test_a_file_cut_after_load_is_named(source):
    os.truncate(source.extents[0].file, NBYTES // 2)
    with pytest.raises(ReadError, match=r"w\.bin ends at byte .* more bytes are needed"):
        read(source)


def test_a_file_that_changed_since_its_header_was_read_is_refused(source):
    path = source.extents[0].file
    stamps = {path: FileStamp.of(path)}
    os.utime(path, ns=(1, 1))
    with pytest.raises(ReadError, match="has changed since its header was read"):
        read(source, stamps)


def test_a_missing_file_is_an_error_with_the_units_name(source):
    os.unlink(source.extents[0].file)
    with pytest.raises(ReadError, match=r"weights of layers\.7 could not be read"):
        read(source)


def test_a_reader_recovers_after_an_error(source, tmp_path):
    good = lay_out([source], block_bytes=1 << 20, gap_bytes=0)
    missing = Source("w", torch.uint8, (9,), torch.uint8, (Extent(str(tmp_path / "none"), 0, 9, 0),))
    bad = lay_out([missing], block_bytes=1 << 20, gap_bytes=0)
    slab = Arena(good.nbytes)
    reader = Reader(num_threads=1, stamps={})
    try:
        failing = reader.submit("bad", bad, slab)
        fine = reader.submit("good", good, slab)
        with pytest.raises(ReadError):
            failing.wait()
        fine.wait()
    finally:
        reader.close()


def test_what_was_given_up_before_it_began_is_not_read(source, tmp_path):
    os.mkfifo(tmp_path / "slow")  # a reader that opens it waits until somebody writes
    slow = Source("v", torch.uint8, (9,), torch.uint8, (Extent(str(tmp_path / "slow"), 0, 9, 0),))
    layouts = [lay_out([each], block_bytes=1 << 20, gap_bytes=0) for each in (slow, source)]
    slabs = [Arena(layout.nbytes) for layout in layouts]
    reader = Reader(num_threads=1, stamps={})
    try:
        reader.submit("slow", layouts[0], slabs[0])
        ticket = reader.submit("layers.7", layouts[1], slabs[1])
        ticket.cancel()
        (tmp_path / "slow").write_bytes(b"")
        with pytest.raises(ReadError, match=r"layers\.7 was given up"):
            ticket.wait()
        assert not slabs[1].tensor.any()
    finally:
        reader.close()


def test_closing_ends_threads_and_gives_memory_back(source):
    before = set(threading.enumerate())
    layout = lay_out([source], block_bytes=1 << 20, gap_bytes=0)
    slab = Arena(layout.nbytes)
    reader = Reader(num_threads=4, stamps={})
    reader.submit("w", layout, slab).wait()
    reader.close()
    assert set(threading.enumerate()) == before
    assert not [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == source.extents[0].file]
    mapped = _anonymous_bytes()
    del slab
    gc.collect()
    assert _anonymous_bytes() <= mapped - NBYTES // 2


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None


def _anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def test_threads_that_cannot_all_be_started_leave_none_behind(monkeypatch):
    before, start = set(threading.enumerate()), threading.Thread.start

    def limited(thread):
        if thread.name.endswith("-2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(StreamingError, match="4 reader threads could not be started"):
        Reader(num_threads=4, stamps={})
    assert set(threading.enumerate()) == before


def test_memory_that_cannot_be_mapped_is_refused_with_its_size():
    with pytest.raises(DoesNotFitError, match=r"TiB of host memory could not be mapped") as caught:
        Arena(1 << 56)
    assert caught.value.needed_bytes >= 1 << 56


@pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")
def test_host_memory_longer_than_the_ring_is_copied_through_it():
    """While a buffer is copied nothing else is written into it."""
    source = torch.arange(10 * BLOCK_BYTES // 8 + 5).view(torch.uint8)[3:]
    with simulated(1, link_bytes_per_s=1.5e8):
        memory = DeviceMemory(source.numel(), Link(torch.device("sim:0")))
        reader = Reader(num_threads=4, stamps={}, ring=Ring(memory.link.device))
        try:
            ticket = reader.submit_copy("layers.7", source, memory)
            ticket.wait()
            memory.link.wait(ticket.filled)
            assert torch.equal(memory.tensor.cpu(), source)
        finally:
            reader.close()
