"""Host memory that CUDA's driver refuses to page-lock: the driver's part is played here, the devices are simulated."""

import contextlib
import gc
import itertools
import logging
import threading
from dataclasses import replace

import pytest
import torch
from families import inputs_for, make_checkpoint, resident
from simulated import COMPILER, simulated

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.errors import ReadError
from bigmodel.offload import link
from bigmodel.offload.arena import ALIGN_BYTES

pytestmark = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")

SMALL = bigmodel.Workload(batch_size=2, prompt_tokens=16, new_tokens=8)
REFUSED = 2  # cudaErrorMemoryAllocation


class Runtime:
    """CUDA's functions; page-locks the ring where `locks_ring`, and other memory where `locks_slabs`."""

    def __init__(self, *, locks_ring, locks_slabs=False):
        self.locks_ring, self.locks_slabs = locks_ring, locks_slabs
        self.locked = {}

    def cudaHostRegister(self, address, nbytes, flags):
        if not (self.locks_ring if nbytes == link.RING_BYTES else self.locks_slabs):
            return REFUSED
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]
        return 0


@pytest.fixture
def refuse(monkeypatch):
    """Called with what a Runtime takes: from then on the devices have that driver."""

    def set_runtime(**options):
        runtime = Runtime(**options)
        monkeypatch.setattr(link, "_runtime_of", lambda device: runtime)
        return runtime

    return set_runtime


def load(folder, num_devices):
    """What runs on so many devices in turns and rests in host memory, but for the ends of the model."""
    devices = [f"sim:{index}" for index in range(num_devices)]
    limits = dict.fromkeys(devices, CONTEXT_BYTES + (64 << 20)) | {"cpu": "4GiB"}
    homes = {"": "cpu", "model.embed_tokens": devices[0], "lm_head": devices[-1]}
    device_map = homes
    if num_devices > 1:
        here = bigmodel.Machine.probe()
        slow = tuple(replace(each, h2d_bytes_per_s=1e6) for each in here.accelerators)  # so that all links are used
        device_map = bigmodel.make_plan(folder, replace(here, accelerators=slow), SMALL, limits, homes)
    model = bigmodel.load_sharded(folder, device_map=device_map, max_memory=limits, workload=SMALL, progress=False)
    assert {group.device for group in bigmodel.plan_of(model).slots} == set(devices)
    return model


@pytest.fixture
def reader_threads():
    """Gives the threads that were begun in this test."""
    gc.collect()  # of other tests
    before = set(threading.enumerate())
    return lambda: [
        thread for thread in threading.enumerate() if thread.name.startswith("bigmodel-reader") and thread not in before
    ]


@pytest.mark.parametrize("locks_ring", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_virtual_clock", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_devices", [2, pytest.param(1, marks=pytest.mark.slow)])
@torch.no_grad()
def test_weights_in_memory_that_is_not_page_locked_come_through_the_ring(
    num_devices, with_virtual_clock, locks_ring, reader_threads, refuse, caplog, tmp_path
):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    runtime = refuse(locks_ring=locks_ring)
    # By the real clock a buffer that were filled again too early would be copied with other bytes.
    with simulated(num_devices, link_bytes_per_s=1e7, operator_s=1e-5, with_virtual_clock=with_virtual_clock):
        with caplog.at_level(logging.WARNING, logger="bigmodel"):
            model = load(folder, num_devices)
            for _ in range(3):
                assert torch.equal(model(**inputs_for("llama")).logits, expected)
        assert reader_threads()
        assert bigmodel.stats_of(model).read_bytes == 0
        (warning,) = (record.getMessage() for record in caplog.records)
        assert "could not be page-locked (CUDA error 2)" in warning
        assert "ulimit -l" in warning
        assert list(runtime.locked.values()) == [link.RING_BYTES] * locks_ring
        del model
        gc.collect()
        assert not reader_threads()
        assert not runtime.locked


@torch.no_grad()
def test_page_locked_memory_is_copied_from_without_threads_and_released_with_the_model(
    reader_threads, refuse, caplog, tmp_path
):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    runtime = refuse(locks_ring=True, locks_slabs=True)
    with simulated(1):
        model = load(folder, 1)
        assert torch.equal(model(**inputs_for("llama")).logits, expected)
        assert runtime.locked
        assert not reader_threads()
        del model
        gc.collect()
    assert not runtime.locked
    assert not caplog.records


@torch.no_grad()
def test_a_copy_through_the_ring_that_fails_is_an_error_with_the_unit_s_name(
    reader_threads, refuse, monkeypatch, tmp_path
):
    folder = make_checkpoint("llama", tmp_path)
    expected = resident(folder)(**inputs_for("llama")).logits
    refuse(locks_ring=True)
    with simulated(1):
        model = load(folder, 1)
        assert torch.equal(model(**inputs_for("llama")).logits, expected)

        def fail(*_):
            raise RuntimeError("the link is down")

        with monkeypatch.context() as broken:
            broken.setattr(link.Link, "copy", fail)
            with contextlib.suppress(ReadError):  # what was fetched ahead may do for one pass
                model(**inputs_for("llama"))
            with pytest.raises(ReadError, match=r"of model\.[a-z_.0-9]+ could not be read: the link is down"):
                model(**inputs_for("llama"))
        assert torch.equal(model(**inputs_for("llama")).logits, expected)
        bigmodel.unload(model)
        assert not reader_threads()


def test_a_refusal_is_not_left_for_the_next_kernel_to_report(refuse, monkeypatch):
    """CUDA keeps an error for whoever asks next: torch, after each kernel that it launches."""
    refuse(locks_ring=False)
    launched = []

    def launch(*args, **options):
        launched.append(options["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", launch)
    with simulated(1):
        link.Ring(torch.device("sim:0"))
    assert launched == [torch.device("sim:0")]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_ring_that_cannot_be_page_locked_in_place_is_torch_s_pinned_memory(is_pinned, refuse, monkeypatch, caplog):
    refuse(locks_ring=False)
    asked, empty = [], torch.empty

    def allocate(nbytes, **options):
        if options.get("pin_memory"):
            asked.append(nbytes)
            if not is_pinned:
                raise RuntimeError("CUDA error: out of memory")
        return empty(nbytes, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    with simulated(1):
        ring = link.Ring(torch.device("sim:0"))
    assert asked == [128 << 20]  # a power of two, and not more than the plan counts
    with contextlib.ExitStack() as held:
        chunks = [held.enter_context(ring.chunk()) for _ in range(7 if is_pinned else 8)]
        assert ring._chunks.empty()
    begins = sorted(chunk.tensor.data_ptr() for chunk in chunks)
    assert all(begin % ALIGN_BYTES == 0 for begin in begins)
    assert all(later - begin >= chunks[0].tensor.numel() for begin, later in itertools.pairwise(begins))
    assert len(caplog.records) == (not is_pinned)
