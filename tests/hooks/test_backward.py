"""Gradients through weights that stream are those of weights that stay, or a named error."""

import copy
import inspect
import threading

import pytest
import torch
import toy
from simulated import COMPILER, IS_FRESH, passes_afresh
from toy import streamed_stack

from bigmodel.errors import GradientRefusedError

X = torch.linspace(-1, 1, 3 * 16).view(3, 16)


@pytest.fixture(autouse=True)
def place():
    """Everything holds on the host, and afresh on an accelerator."""
    if not IS_FRESH:
        yield
        return
    with toy.on_an_accelerator():
        yield


@pytest.mark.skipif(IS_FRESH or COMPILER is None, reason="simulated accelerators need a C++ compiler")
def test_all_of_it_holds_on_an_accelerator():
    passes_afresh(__file__)


def pair(num_slots=2, **options):
    """The same stack streamed and resident, its weights frozen."""
    model, reference, attachment, store = streamed_stack(num_slots=num_slots, **options)
    return model, reference.requires_grad_(False), attachment, store


def gradient_of(model, times=1, x=X):
    x = x.clone().requires_grad_()
    for _ in range(times):
        model(x).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_gradients_of_inputs_are_right_for_any_number_of_slots(num_slots):
    model, reference, attachment, _ = pair(num_slots)
    for times in (1, 2):
        assert torch.equal(gradient_of(model, times), gradient_of(reference, times))
    assert attachment.stats().num_passes == 3
    assert not any(unit.depth or unit.is_bound for unit in attachment._streamer._units)
    with torch.no_grad():
        assert torch.equal(model(X), reference(X))


def test_each_unit_is_read_twice_and_the_last_once():
    model, _, _, store = pair(num_slots=2)
    gradient_of(model)
    store.fetched.clear()
    for _ in range(3):
        gradient_of(model)
    # Of five units in two slots the two that were used last are there when backward begins, and when forward does.
    assert len(store.fetched) <= 3 * (2 * 5 - 2)
    assert set(store.fetched) == {f"blocks.{number}" for number in range(5)}


def test_weights_are_on_their_way_before_backward_needs_them():
    model, _, attachment, _ = pair(num_slots=3)
    gradient_of(model)
    gradient_of(model)
    before = attachment.stats()
    gradient_of(model)
    assert (attachment.stats() - before).num_misses == 0


def test_passes_may_lie_between_a_pass_and_its_backward():
    model, reference, _, _ = pair()
    found = []
    for each in (model, reference):
        x = X.clone().requires_grad_()
        first, second = each(x), each(2 * x)
        with torch.no_grad():
            each(X)
        first.sum().backward(retain_graph=True)
        second.square().sum().backward()
        first.sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_a_backward_that_fails_leaves_the_model_usable():
    model, reference, _, _ = pair()
    x = X.clone().requires_grad_()
    y = model(x)
    model.blocks[1].fail = True
    with pytest.raises(RuntimeError, match="broken block"):
        y.sum().backward()
    model.blocks[1].fail = False
    done = threading.Thread(target=lambda: torch.no_grad()(model)(X), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()
    assert torch.equal(gradient_of(model), gradient_of(reference))


def test_what_was_added_to_units_is_trained():
    model, reference, _, _ = pair()
    torch.manual_seed(0)
    found = []
    adapter = torch.nn.Linear(16, 16)
    for each in (model, reference):
        for number in (1, 3):
            each.blocks[number].adapter = torch.nn.Linear(16, 16)
            each.blocks[number].adapter.load_state_dict(adapter.state_dict())
            each.blocks[number].register_forward_hook(lambda module, args, output: output + module.adapter(args[0]))
        each(X).square().sum().backward()
        found.append([parameter.grad.cpu() for parameter in each.parameters() if parameter.requires_grad])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_would_give_wrong_gradients_is_refused_by_name():
    model, reference, _, _ = pair()
    with pytest.raises(GradientRefusedError, match=r"blocks\.2 was given an input that requires grad"):
        model.blocks[2](X.clone().requires_grad_())  # before the whole model was called
    next(model.blocks[3].parameters()).requires_grad_(True)
    with pytest.raises(GradientRefusedError, match=r"1 of the model's own parameters require grad, such as blocks\.3"):
        model(X)
    model.requires_grad_(False)
    assert torch.equal(gradient_of(model), gradient_of(reference))


@pytest.mark.skipif(IS_FRESH, reason="a copy stays where its weights rest, on the host")
def test_a_copy_of_a_unit_is_its_own():
    model, reference, _, _ = pair()
    gradient_of(model)
    twin = copy.deepcopy(model.blocks[1])
    assert torch.equal(twin(X), reference.blocks[1](X))
    with torch.no_grad():
        twin.lin.bias.fill_(3.0)
    assert not torch.equal(twin(X), reference.blocks[1](X))
    assert torch.equal(model(X), reference(X))
    assert str(inspect.signature(model.blocks[0].forward)) == "(x)"


@pytest.mark.skipif(IS_FRESH, reason="one thread of autograd's serves an accelerator: the second is refused")
def test_backward_in_two_threads_takes_turns():
    model, reference, _, _ = pair(delay_s=0.001)
    for _ in range(5):
        inputs = [(X * (1 + number)).clone().requires_grad_() for number in range(2)]
        losses = [model(each).square().sum() for each in inputs]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
            assert not each.is_alive()
        for number, each in enumerate(inputs):
            assert torch.equal(each.grad, gradient_of(reference, x=X * (1 + number)))


def test_gradients_of_gradients_are_refused():
    model, reference, _, _ = pair()
    x = X.clone().requires_grad_()
    with pytest.raises(GradientRefusedError, match=r"itself recorded \(create_graph=True\)"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert torch.equal(gradient_of(model), gradient_of(reference))


def test_one_backward_of_passes_of_two_threads_is_refused():
    model, reference, _, _ = pair()
    x, found = X.clone().requires_grad_(), []
    for number in range(2):
        done = threading.Thread(target=lambda n=number: found.append(model(x * (1 + n)).sum()))
        done.start()
        done.join(20)
    with pytest.raises(GradientRefusedError, match="passes of two threads"):
        (found[0] + found[1]).backward()
    assert torch.equal(gradient_of(model), gradient_of(reference))


def with_adapters(model):
    """Blocks 1 and 3 with something that is trained."""
    torch.manual_seed(0)
    for number in (1, 3):
        block = model.blocks[number]
        block.adapter = torch.nn.Linear(16, 16)
        block.register_forward_hook(lambda module, args, output: output + module.adapter(args[0]))
    return model


def trained(model):
    return [each for each in model.parameters() if each.requires_grad]


def test_a_pass_in_the_middle_of_a_backward_leaves_its_weights():
    found = []
    model, reference, _, _ = pair()
    for each in map(with_adapters, (model, reference)):
        for parameter in trained(each):
            parameter.register_post_accumulate_grad_hook(lambda _, own=each: [torch.no_grad()(own)(X)].clear())
        each(X).square().sum().backward()
        found.append([parameter.grad.cpu() for parameter in trained(each)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_backward_inside_of_another_is_refused():
    model, *_ = pair()
    other = model(X.clone().requires_grad_()).sum()
    with_adapters(model)
    trained(model)[-1].register_post_accumulate_grad_hook(lambda _: other.backward())  # which returns nothing
    with pytest.raises(GradientRefusedError, match="inside of another one"):
        model(X).square().sum().backward()
    with torch.no_grad():
        model(X)


def test_what_changes_between_a_pass_and_its_backward_is_refused():
    model = with_adapters(pair()[0])

    def written():
        with torch.no_grad():
            trained(model)[2].mul_(2)

    for change in (written, lambda: model.blocks[3].train()):
        loss = model(X).square().sum()
        change()
        told = (
            "(adapter|training).* of a Block changed between a pass and its backward|modified by an inplace operation"
        )
        with pytest.raises((GradientRefusedError, RuntimeError), match=told):
            loss.backward()
        model.zero_grad()
        model(X).square().sum().backward()
    parameters = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    loss = torch.func.functional_call(model, {n: p for n, p in parameters.items() if "adapter" in n}, (X,)).sum()
    with pytest.raises(GradientRefusedError, match="changed between a pass and its backward"):
        loss.backward()


def test_a_gradient_that_comes_from_elsewhere_is_refused_or_right():
    model, reference, _, _ = pair()
    vector = torch.ones(16, requires_grad=True)
    if toy.device is not None:
        vector = torch.ones(16).to(toy.device).requires_grad_()
    handle = model.blocks[2].register_forward_hook(lambda module, args, output: output * vector, prepend=True)
    with pytest.raises(GradientRefusedError, match=r"blocks\.2 computed with something from elsewhere"):
        model(X)
    handle.remove()
    found = []
    for each in map(with_adapters, (model, reference)):
        own = vector.detach().cpu() if each is reference else vector.detach()
        own.requires_grad_()
        each.blocks[0].within = lambda x, own=own, block=each.blocks[0]: (x * own) @ block.lin.weight.T
        for size in (1, 2):
            each(size * X).square().sum().backward()
        found.append(own.grad.cpu())
    assert torch.equal(*found)


def test_what_a_forward_counts_is_counted_once():
    model, _, _, _ = pair()
    norm = torch.nn.BatchNorm1d(16).requires_grad_(False)
    if toy.device is not None:
        norm = norm.to(toy.device)
    model.blocks[2].within = norm
    with_adapters(model).train()
    for _ in range(3):
        model(X).square().sum().backward()
    assert int(norm.num_batches_tracked) == 3
