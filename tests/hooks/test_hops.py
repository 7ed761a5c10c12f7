"""What crosses between devices: once for each, in the container that it was in, and not longer than what it was made from."""

import gc
from collections import OrderedDict, namedtuple

import pytest
import torch
from simulated import COMPILER, simulated
from transformers.modeling_outputs import BaseModelOutput

from bigmodel.hooks.hops import Hops, moved

pytestmark = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")

Pair = namedtuple("Pair", ["first", "second"])
CPU = torch.device("cpu")


@pytest.fixture
def device():
    with simulated(1):
        yield torch.device("sim:0")


def test_every_container_arrives_as_what_it_was(device):
    here, there, other = torch.ones(3), torch.ones(3, device=device), object()
    for value in ((here, other), [here], Pair(here, there), {"a": (here,), "b": other}, OrderedDict(a=here)):
        found = moved(value, device)
        assert type(found) is type(value)
        tensors = found.values() if isinstance(found, dict) else found
        assert all(each.device == device for each in tensors if isinstance(each, torch.Tensor))
    output = BaseModelOutput(last_hidden_state=here)
    assert moved(output, device).last_hidden_state.device == device
    for value in ((there, other), {"a": there}, other, None):
        assert moved(value, device) is value


def test_a_tensor_crosses_once_and_again_when_it_was_changed_in_place(device):
    hops, mask = Hops(), torch.ones(3)
    first = hops.to(mask, device)
    assert hops.to(mask, device) is first
    mask[0] = 5
    assert torch.equal(hops.to(mask, device).cpu(), mask)


def test_what_a_pass_is_given_goes_back_to_where_it_came_from_without_a_copy(device):
    hops, ids = Hops(), torch.ones(3)
    there = hops.into_pass(ids, device)
    assert there.device == device
    assert hops.to(there, CPU) is ids


def test_a_copy_goes_with_what_it_was_made_from(device):
    gc.collect()  # of other tests
    before = torch.accelerator.memory_allocated(device)
    hops, hidden = Hops(), torch.ones(3)
    hops.to(hidden, device)
    assert torch.accelerator.memory_allocated(device) > before
    del hidden
    assert torch.accelerator.memory_allocated(device) == before
