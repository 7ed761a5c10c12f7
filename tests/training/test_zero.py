"""What is DeepSpeed's alone: masters that are not the module's parameters, one dtype for all, ranges of flat tensors."""

from __future__ import annotations

import math

import pytest
import torch

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.pieces import rectangles
from training.loops import OddShapes, Sentences, masters, save_llama, train
from training.pool import started
from training.test_engines import ZERO, largest_difference

SOME = [pytest.param(each, marks=() if each == "zero3" else pytest.mark.slow) for each in ZERO]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint in float32, of values that bfloat16 rounds."""
    path = tmp_path_factory.mktemp("wide")
    save_llama(path, stored=torch.float32)
    return path


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (1, 4, 1, 3)])
def test_any_range_is_a_few_rectangles(shape):
    number = math.prod(shape)
    values = torch.arange(number).view(shape)
    for start in range(number + 1):
        for stop in range(start, number + 1):
            found = list(rectangles(shape, start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            parts = [
                values[tuple(slice(at, at + size) for at, size in zip(*each, strict=True))].reshape(-1)
                for each in found
            ]
            assert torch.equal(torch.cat([torch.arange(0), *parts]), torch.arange(start, stop))


@pytest.mark.parametrize("strategy", SOME)
@pytest.mark.parametrize("from_memory", [False, True])
def test_masters_are_what_is_stored_and_not_what_bfloat16_leaves_of_it(two, wide, strategy, from_memory):
    from transformers import AutoModelForCausalLM

    expected = dict(AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).named_parameters())
    assert any(not torch.equal(each, each.bfloat16().float()) for each in expected.values())
    for found in two.run("training.loops:untrained", path=str(wide), strategy=strategy, from_memory=from_memory):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("strategy", SOME)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_with_gradients_that_are_not_finite_is_left_out(two, folder, strategy, precision):
    for found in two.run("training.loops:overflown", path=str(folder), strategy=strategy, precision=precision):
        assert found["skipped"] == [False, True, False]
        assert found["steps"] == [1, 1, 2]
        assert found["lrs"][0] < found["lrs"][1] == found["lrs"][2]  # of the step, before the scheduler moved
        assert found["is_unchanged"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_float16_with_deepspeeds_own_scale(two, folder, tmp_path, strategy):
    expected = train(folder, 20, strategy="single", precision="fp32", micro_batch_size=2)
    for found in two.run("training.loops:in_float16", path=str(folder), folder=str(tmp_path), strategy=strategy):
        assert max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)) <= 2e-3
        assert found["skipped"] == [False, True, False]
        assert found["is_unchanged"]
        assert found["are_read"]
        assert found["scale"] == (65536.0, 20)


@pytest.mark.parametrize("strategy", SOME)
def test_what_is_frozen_stays_and_is_saved(two, folder, tmp_path, strategy):
    asked = {"path": str(folder), "folder": str(tmp_path / "1"), "strategy": strategy}
    for found in two.run("training.loops:frozen", **asked):
        assert found["are_kept"]
        assert found["are_trained"]
    for found in two.run("training.loops:frozen", **asked | {"strategy": "fsdp", "loads": True}):
        assert found["are_equal"]


@pytest.mark.parametrize(
    ("scale", "before", "after"),
    [
        (1.5, "zero3", "ddp"),
        ([1.5], "zero3", "zero1"),
        pytest.param(1.5, "ddp", "zero3", marks=pytest.mark.slow),
        pytest.param([1.5], "zero2", "zero3", marks=pytest.mark.slow),
    ],
)
def test_shapes_of_all_kinds_go_on_with_another_engine(two, tmp_path, scale, before, after):
    def run(name, **asked):
        return two.run("training.loops:odd_shapes", folder=str(tmp_path / name), scale=scale, **asked)[0]

    expected = run("1", strategy="ddp", steps=6)
    run("2", strategy=before, steps=3)
    assert largest_difference(run("2", strategy=after, steps=3, loads=True), expected) <= 5e-6


def alone(folder, strategy="zero2", **more):
    run = TrainingRun(TrainingConfig(strategy=strategy, precision="fp32"))
    options = {"optimizer": lambda params: torch.optim.AdamW(params), "data": Sentences(), "progress": False}
    return run, run.prepare(model=str(folder), **options | more)


def test_one_process_alone(folder):
    found = train(folder, 3, strategy="zero3", precision="fp32", micro_batch_size=4)
    expected = train(folder, 3, strategy="single", precision="fp32", micro_batch_size=4)
    assert largest_difference(found["parameters"], expected["parameters"]) <= 1e-5


def test_what_it_cannot_do_is_refused(folder):
    with pytest.raises(InvalidArgumentError, match="there is no optimizer"):
        alone(folder, optimizer=None)
    with pytest.raises(InvalidArgumentError, match="1 parameters that are trained are not in the optimizer"):
        alone(folder, optimizer=lambda params: torch.optim.AdamW(params[1:]))
    with pytest.raises(InvalidArgumentError, match="replaces Adagrad"):
        alone(folder, optimizer=lambda params: torch.optim.Adagrad(params))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    run = TrainingRun(TrainingConfig(strategy="zero1"))
    with pytest.raises(InvalidArgumentError, match=r"2 frozen parameters are not torch.bfloat16, such as 0.weight"):
        run.prepare(model=model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(InvalidArgumentError, match=r'1 parameters are scalars, such as scale.* Give strategy="zero3"'):
        TrainingRun(TrainingConfig(strategy="zero1", precision="fp32")).prepare(OddShapes(torch.tensor(1.0)))
    with pytest.raises(
        InvalidArgumentError, match="Parameter group 0 of the optimizer has no parameter that is trained"
    ):
        alone(folder, optimizer=lambda params: torch.optim.SGD([{"params": []}, {"params": params}], lr=0.1))
    with pytest.raises(InvalidArgumentError, match="replicas is 2"):
        TrainingRun(TrainingConfig(strategy="zero3", replicas=2))


def test_states_that_flat_tensors_cannot_hold_are_refused_before_anything_is_changed(folder, tmp_path):
    run, (model, optimizer, loader) = alone(folder, strategy="single")
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        break
    optimizer.state[model.model.norm.weight]["step"] += 1
    run.save(tmp_path / "1")
    run, _ = alone(folder)
    before = masters(run)
    with pytest.raises(TrainingError, match="different values of 'step'"):
        run.load(tmp_path / "1")
    assert all(torch.equal(each, before[name]) for name, each in masters(run).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "strategies"), [(3, ("zero3", "zero2")), pytest.param(4, ("zero3", "fsdp"), marks=pytest.mark.long)]
)
def test_more_processes_and_another_number_of_them(folder, two, tmp_path, size, strategies):
    asked = {"precision": "fp32", "micro_batch_size": 1, "groups": True}
    whole = train(folder, 8, strategy="single", **asked)
    two.run(
        "training.loops:resumed",
        path=str(folder),
        folder=str(tmp_path / "4"),
        first=4,
        then=0,
        strategy="zero3",
        **asked,
    )
    with started(size) as more:
        for strategy in strategies:
            found = more.run(
                "training.loops:resumed",
                path=str(folder),
                folder=str(tmp_path / "4"),
                first=0,
                then=4,
                strategy=strategy,
                **asked,
            )[0]
            assert max(abs(a - b) for a, b in zip(found["losses"], whole["losses"][4:], strict=True)) <= 2e-6
            assert largest_difference(found["parameters"], whole["parameters"]) <= 5e-6
