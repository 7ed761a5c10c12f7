"""Streaming is exact, whatever happens in between."""

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
import torch
import toy
from simulated import COMPILER
from toy import UNIT_BYTES, streamed_stack

from bigmodel.errors import ForkedError, MoveRefusedError, ReadError, StreamingError
from bigmodel.hooks.hops import Phase
from bigmodel.hooks.pace import PassKind

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")


@pytest.fixture(autouse=True, params=["host", pytest.param("accelerator", marks=needs_compiler)])
def place(request):
    """Everything holds on the host and on an accelerator."""
    if request.param == "host":
        yield
        return
    with toy.on_an_accelerator():
        yield


X = torch.linspace(-1, 1, 3 * 16).view(3, 16)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 7])
def test_output_is_equal_for_any_number_of_slots(num_slots):
    model, reference, attachment, store = streamed_stack(num_slots=num_slots)
    for _ in range(3):
        assert torch.equal(model(X), reference(X))
    stats = attachment.stats()
    assert stats.num_passes == 3
    # A ring reads every unit every pass; with a slot for each, the first pass is the only one that reads.
    passes_read = 1 if num_slots >= 5 else 3
    assert 5 * passes_read <= len(store.fetched) <= 5 * passes_read + num_slots
    assert stats.read_bytes == len(store.fetched) * UNIT_BYTES


def test_the_next_units_are_issued_before_the_computation_needs_them():
    model, _, attachment, store = streamed_stack(num_slots=3, delay_s=0.01)
    model(X)
    before = attachment.stats()
    model(X)
    assert (attachment.stats() - before).num_misses == 0
    assert store.fetched[:8] == [f"blocks.{i}" for i in (0, 1, 2, 3, 4, 0, 1, 2)]


def test_an_order_that_changes_costs_time_and_never_correctness():
    model, reference, _, _ = streamed_stack(num_slots=2)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, 0], [1], [0, 1, 0, 1, 4], [3, 0, 4]):
        model.order = reference.order = order
        for _ in range(2):
            assert torch.equal(model(X), reference(X))


@pytest.mark.parametrize("num_slots", [2, 3])
def test_units_that_were_expected_and_did_not_come_give_their_slots_back(num_slots):
    model, reference, attachment, _ = streamed_stack(num_slots=num_slots)
    model(X)  # the first units of the next pass are on their way
    model.order = reference.order = [3, 4]
    for _ in range(4):
        assert torch.equal(model(X), reference(X))
    before = attachment.stats()
    assert torch.equal(model(X), reference(X))
    assert (attachment.stats() - before).num_reads == 0  # each has a slot


def test_the_lock_of_something_else_than_a_pass_is_never_taken_over():
    _, _, attachment, _ = streamed_stack(num_slots=2)
    lock, taken = attachment._lock, threading.Event()

    def take():
        lock.acquire()
        taken.set()
        lock.release()

    with lock:
        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.5)
    assert taken.wait(5)
    thread.join()


def test_an_exception_in_the_middle_leaves_the_model_usable():
    model, reference, attachment, _ = streamed_stack(num_slots=2)
    model.blocks[2].fail = True
    for _ in range(4):
        with pytest.raises(RuntimeError, match="broken block"):
            model(X)
    model.blocks[2].fail = False
    assert torch.equal(model(X), reference(X))
    assert attachment.stats().num_passes == 1


@pytest.mark.parametrize("num_slots", [1, 2])
def test_an_interrupt_that_no_hook_sees_leaves_the_model_usable(num_slots):
    model, reference, _, _ = streamed_stack(num_slots=num_slots)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.blocks[3].lin.register_forward_pre_hook(interrupt)
    other = model.blocks[3].register_forward_pre_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(X)
    handle.remove()
    other.remove()
    done = []
    thread = threading.Thread(target=lambda: done.append(model(X)))
    thread.start()
    thread.join(10)
    assert torch.equal(done[0], reference(X))
    assert torch.equal(model(X), reference(X))


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_read_that_was_given_up_is_never_taken_for_done(num_slots):
    model, reference, attachment, store = streamed_stack(num_slots=num_slots)
    streamer = attachment._streamer
    model(X)
    # As an interrupt in the middle of a claim leaves a slot: filling, for nobody; once noted, once not.
    for forget_ticket in (False, True):
        slot = streamer._lanes[0][0]
        if slot.unit is not None:
            streamer._units[slot.unit].slot = None
        store.delay_s = 0.1
        slot.ticket = store.fetch("blocks.3", slot.memory, is_urgent=False)
        store.delay_s = 0.0
        slot.state, slot.unit = type(slot.state).FILLING, None
        if forget_ticket:
            slot.ticket = None
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert torch.equal(model(X), reference(X))
            store.close()  # waits for it


@pytest.mark.parametrize("place", ["host"], indirect=True)
def test_a_slot_is_given_on_when_nothing_writes_into_it_any_more():
    model, reference, _, store = streamed_stack(num_slots=1, delay_s=0.1)
    model.blocks[0](X)  # the next one is on its way
    store.delay_s = 0.0
    assert torch.equal(model.blocks[3](X), reference.blocks[3](X))
    store.close()
    assert torch.equal(model.blocks[4](X), reference.blocks[4](X))


def test_a_failed_read_surfaces_with_the_units_name_and_can_be_tried_again():
    model, reference, _, store = streamed_stack(num_slots=2)
    model(X)
    store.broken.add("blocks.3")
    for _ in range(2):
        with pytest.raises(ReadError, match=r"blocks\.3 could not be read: disk on fire"):
            model(X)
    store.broken.clear()
    assert torch.equal(model(X), reference(X))


def test_at_rest_a_parameter_shows_its_true_bytes():
    model, reference, _, _ = streamed_stack(num_slots=1)
    parameters = dict(model.named_parameters())
    model(X)
    assert all(torch.equal(p, dict(reference.named_parameters())[n]) for n, p in model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    # A forward that no hook sees uses the bytes where they rest.
    assert torch.equal(model.blocks[1].forward(X), reference.blocks[1](X))


@pytest.mark.parametrize("place", ["host"], indirect=True)
def test_users_own_hooks_see_the_weights():
    model, reference, _, _ = streamed_stack(num_slots=1)
    seen = []
    model.blocks[4].register_forward_pre_hook(lambda m, a: seen.append(m.lin.weight.clone()))
    model.blocks[4].register_forward_hook(lambda m, a, o: seen.append(m.lin.weight.clone()))
    model(X)
    assert len(seen) == 2
    assert all(torch.equal(weight, reference.blocks[4].lin.weight) for weight in seen)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same(mode):
    model, reference, _, _ = streamed_stack(num_slots=2)
    with mode():
        assert torch.equal(model(X), reference(X))
    with torch.inference_mode():
        assert torch.equal(model(X), reference(X))
    assert torch.equal(model(X), reference(X))


def test_moves_are_refused_before_anything_changes():
    model, reference, _, _ = streamed_stack(num_slots=2)
    for move in (model.half, model.double, lambda: model.to("meta"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(MoveRefusedError, match=r"bigmodel\.materialize"):
            move()
    assert all(move() is model for move in (lambda: model.to("cpu"), model.float, model.cpu))
    assert torch.equal(model(X), reference(X))


def test_a_weight_changed_at_rest_is_an_error_and_the_change_is_kept():
    model, _, _, _ = streamed_stack(num_slots=2)
    model(X)
    with torch.no_grad():
        model.blocks[3].lin.weight.data = torch.ones(16, 16)
    with pytest.raises(StreamingError, match=r"blocks\.3\.lin\.weight changed while resting"):
        model(X)
    assert torch.equal(model.blocks[3].lin.weight, torch.ones(16, 16))


def test_copies_and_pickles_are_refused():
    model, _, _, _ = streamed_stack()
    with pytest.raises(StreamingError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(StreamingError, match="cannot be pickled"):
        pickle.dumps(model)


def test_threads_take_turns():
    model, reference, _, _ = streamed_stack(num_slots=2, delay_s=0.001)
    results = []
    threads = [threading.Thread(target=lambda: results.extend(model(X) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(torch.equal(result, reference(X)) for result in results)


@pytest.mark.parametrize("place", ["host"], indirect=True)
def test_submodules_can_be_called_without_the_root():
    model, reference, _, _ = streamed_stack(num_slots=2)
    for number in (3, 1, 1, 0):
        assert torch.equal(model.blocks[number](X), reference.blocks[number](X))
    assert torch.equal(model(X), reference(X))


def test_a_forked_child_raises():
    model, _, _, _ = streamed_stack()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model(X)
        except ForkedError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 100) == b"refused"
    os.close(read)


@pytest.mark.parametrize("place", [pytest.param("accelerator", marks=needs_compiler)], indirect=True)
def test_a_pass_leaves_nothing_on_the_device_of_what_it_was_given():
    model, _, _, _ = streamed_stack(num_slots=2)
    x = X.clone()
    before = torch.accelerator.memory_allocated(toy.device)
    model(x.clone())
    model(x)
    assert torch.accelerator.memory_allocated(toy.device) == before


def test_a_refused_pass_changes_nothing():
    def refuse(entry, module, args, kwargs):
        if args[0].shape[0] > 3:
            raise StreamingError("too large")
        return PassKind(Phase.STEP)

    model, reference, _, _ = streamed_stack(check_pass=refuse)
    with pytest.raises(StreamingError, match="too large"):
        model(X.repeat(2, 1))
    assert torch.equal(model(X), reference(X))


def test_detaching_leaves_a_plain_module():
    model, reference, attachment, _ = streamed_stack(num_slots=2)
    model(X)
    attachment.detach()
    assert torch.equal(model(X), reference(X))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copy.deepcopy(model).double()


def test_a_model_that_nobody_holds_goes_at_once_with_its_slots():
    model, _, attachment, store = streamed_stack(num_slots=2)
    model(X)
    slots = [weakref.ref(slot.memory.tensor) for lane in attachment._streamer._lanes for slot in lane]
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model, attachment
        assert gone() is None
        assert all(slot() is None for slot in slots)
    finally:
        gc.enable()
    assert not any(thread.is_alive() for thread in store.threads)


@pytest.mark.parametrize("place", ["host"], indirect=True)
def test_blocks_that_hold_each_others_slots_run_on_their_weights_at_rest():
    model, reference, _, _ = streamed_stack(num_slots=1)
    model.blocks[0].register_forward_hook(lambda m, a, o: model.blocks[1](o), prepend=True)
    reference.blocks[0].register_forward_hook(lambda m, a, o: reference.blocks[1](o))
    assert torch.equal(model(X), reference(X))
