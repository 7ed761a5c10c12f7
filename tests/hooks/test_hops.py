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
    output = BaseModelOutput(last_hidden_state=here, attentions=(here, there))
    found = moved(output, device)
    assert type(found) is BaseModelOutput
    assert found.last_hidden_state.device == found["last_hidden_state"].device == found.attentions[0].device == device
    assert found.hidden_states is None
    assert list(found) == list(output)
    for value in ((there, other), {"a": there}, other, None):
        assert moved(value, device) is value


def test_what_a_caller_gives_stays_as_he_has_it(device):
    here = torch.ones(3)
    for value in (
        BaseModelOutput(last_hidden_state=here),
        OrderedDict(last_hidden_state=here),
        {"last_hidden_state": here},
    ):
        moved(value, device)
        assert value["last_hidden_state"] is here
        assert getattr(value, "last_hidden_state", here) is here


def test_a_tensor_crosses_once_and_again_when_it_was_changed_in_place(device):
    hops, mask = Hops(), torch.ones(3)
    first = hops.to(mask, device)
    assert hops.to(mask, device) is first
    mask[0] = 5
    assert torch.equal(hops.to(mask, device).cpu(), mask)


def test_a_tensor_of_inference_mode_that_was_changed_in_place_crosses_again(device):
    """Torch does not count what is written into it."""
    with torch.inference_mode():
        hops, hidden = Hops(), torch.ones(3)
        there = hops.into_pass(hidden, device)
        assert torch.equal(hops.to(hidden, device).cpu(), hidden)
        hidden[0] = there[0] = 5
        assert torch.equal(hops.to(hidden, device).cpu(), hidden)
        assert torch.equal(hops.to(there, CPU), hidden)


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
