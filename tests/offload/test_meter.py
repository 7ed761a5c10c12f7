"""Time that several reads take together counts once."""

import threading
import time

import pytest

from bigmodel.offload.meter import Meter, Way


def test_overlapping_reads_count_their_time_once_and_their_bytes_each():
    meter, both = Meter(), threading.Barrier(2)

    def read():
        with meter.reading(100, Way.DIRECT):
            both.wait()
            time.sleep(0.2)

    threads = [threading.Thread(target=read) for _ in range(2)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - started_s
    time.sleep(0.2)
    reads = meter.reads()
    assert (reads.num_bytes, reads.num_blocks, reads.buffered_bytes, reads.cached_bytes) == (200, 2, 0, 0)
    assert 0.2 <= reads.busy_s <= wall_s
    assert reads.best_bytes_per_s >= 200 / reads.busy_s
    before = reads
    with meter.reading(50, Way.BUFFERED):
        time.sleep(0.01)
        assert (meter.reads() - before).busy_s >= 0.01  # also while it goes on
    with meter.reading(30, Way.CACHED):
        time.sleep(0.5)
    later = meter.reads() - before
    assert (later.num_bytes, later.buffered_bytes, later.cached_bytes) == (50, 50, 30)
    assert later.busy_s < 0.5  # a copy out of the page cache is no read from a disk


def test_a_read_that_fails_takes_time_and_gives_no_bytes():
    meter = Meter()

    def read():
        with meter.reading(100, Way.DIRECT):
            time.sleep(0.02)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read()
    assert (meter.reads().num_bytes, meter.reads().num_blocks) == (0, 0)
    assert meter.reads().busy_s >= 0.02
