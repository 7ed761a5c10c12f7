"""Copies to accelerators, on streams of their own."""

import sys
import threading

import pytest
import torch
from simulated import COMPILER, simulated

from bigmodel.offload.link import DeviceMemory, Link

pytestmark = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")
NUM_BYTES = 1 << 12


def test_copies_of_many_threads_leave_each_on_the_stream_and_device_that_it_chose():
    with simulated(2):
        link = Link(torch.device("sim:0"))
        target = DeviceMemory(NUM_BYTES, link)
        source = torch.arange(NUM_BYTES, dtype=torch.int64).to(torch.uint8)
        elsewhere, wrong = [], []

        def copy(device, num_copies):
            own = torch.Stream(device)
            with own:
                for _ in range(num_copies):
                    link.copy(source, target.tensor, None)
                    if torch.accelerator.current_stream(device) != own:
                        wrong.append("stream")
                    if torch.accelerator.current_device_index() != own.device_index:
                        wrong.append("device")
                elsewhere.append(device)

        threads = [threading.Thread(target=copy, args=(f"sim:{number % 2}", 300)) for number in range(4)]
        switching_s = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # they take turns inside of copies
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switching_s)
        assert len(elsewhere) == 4
        assert not wrong
        link.drain()
        assert torch.equal(target.tensor.cpu(), source)
