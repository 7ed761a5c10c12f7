"""Every engine trains as one process in float32 does: loss, gradients, parameters."""

from __future__ import annotations

import itertools

import pytest
import torch

from bigmodel.errors import InvalidArgumentError
from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.gradients import LossScale, gradients_of, norm_and_sums
from bigmodel.training.processes import Processes
from training.loops import Sentences, save_llama, train

TORCHS = ({"strategy": "ddp"}, {"strategy": "fsdp"}, {"strategy": "fsdp", "replicas": 2})
ZERO = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, strategy="single", precision="fp32", micro_batch_size=8, gradients=True)


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


@pytest.mark.parametrize(
    ("options", "micro_batch_size"),
    [
        *itertools.product(TORCHS, [1]),
        *(({"strategy": each}, 2) for each in ZERO),
        *(pytest.param(each, 4, marks=pytest.mark.slow) for each in TORCHS),
        *(pytest.param({"strategy": each}, size, marks=pytest.mark.slow) for each in ZERO for size in (4, 1)),
    ],
)
def test_float32_of_two_processes_is_that_of_one(two, folder, alone, options, micro_batch_size):
    asked = {"precision": "fp32", "micro_batch_size": micro_batch_size, "gradients": True, **options}
    for found in two.run("training.loops:train", path=str(folder), **asked):
        assert found["tokens"] == alone["tokens"]
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 5e-6
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-5
        for name, gradient in found["gradients"].items():
            expected = alone["gradients"][name]
            assert (gradient - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", *(pytest.param(each, marks=pytest.mark.slow) for each in ZERO[:2]), "zero3"]
)
def test_bfloat16_with_float32_masters_stays_near(two, folder, alone, strategy):
    for found in two.run(
        "training.loops:train", path=str(folder), precision="bf16", micro_batch_size=2, strategy=strategy
    ):
        assert all(parameter.dtype == torch.float32 for parameter in found["parameters"].values())
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 2e-3
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-2


@pytest.mark.parametrize("strategy", ["zero1", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_zero_clips_to_the_bit_as_the_others_do(two, tmp_path, strategy):
    save_llama(tmp_path, tie_word_embeddings=False)  # tied ones' gradients are added in float32, elsewhere in bfloat16
    asked = {"path": str(tmp_path), "precision": "bf16", "micro_batch_size": 4, "steps": 3}
    theirs, others = (two.run("training.loops:train", strategy=each, **asked) for each in (strategy, "ddp"))
    for found, other in zip(theirs, others, strict=True):
        assert found["norms"] == pytest.approx(other["norms"], rel=1e-7)
        for name, each in found["parameters"].items():
            assert torch.equal(each, other["parameters"][name]), name


def test_one_process_in_bfloat16(folder, alone):
    found = train(folder, precision="bf16", micro_batch_size=4)
    assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 2e-3
    assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-2


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(each, marks=pytest.mark.slow) for each in ZERO)])
def test_a_step_of_nothing_is_refused_and_nothing_is_lost(two, folder, strategy):
    is_zero = strategy.startswith("zero")
    for found in two.run("training.loops:stepped_too_often", path=str(folder), strategy=strategy, precision="fp32"):
        steps, consumed = zip(*found["steps"], strict=True)
        assert steps == ((1, 2, 3) if is_zero else (1, 3, 4))  # torch's own steps without gradients, and does nothing
        assert consumed == (4, 8, 12)
        assert sum("gave no global batch since" in each for each in found["raised"]) == 4
        assert sum("no backward since the last step" in each for each in found["raised"]) == is_zero


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *(pytest.param(each, marks=pytest.mark.slow) for each in ZERO)])
def test_a_global_batch_whose_last_backward_is_left_out_is_not_stepped(two, folder, strategy):
    asked = {"path": str(folder), "strategy": strategy, "precision": "fp32"}
    whole = two.run("training.loops:stepped", **asked)[0]
    for found in two.run("training.loops:last_left_out", **asked):
        assert len(found["raised"]) == 2
        assert all("The last micro-batch of this global batch had no backward" in each for each in found["raised"])
        assert found["is_unchanged"]
        assert all(torch.equal(each, whole[name]) for name, each in found["parameters"].items())


def test_without_a_loader_of_ours_gradients_are_the_mean_over_processes(two):
    found = two.run("training.loops:own_loader")
    assert found == [1.5, 1.5]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_float16_with_a_scaled_loss_stays_near(two, folder, alone, strategy):
    asked = {"precision": "fp16", "loss_scale": 1024.0, "micro_batch_size": 2, "strategy": strategy}
    for found in two.run("training.loops:train", path=str(folder), **asked):
        assert max(abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)) <= 2e-3
        assert max(abs(a - b) for a, b in zip(found["norms"], alone["norms"], strict=True)) <= 2e-2
        assert largest_difference(found["parameters"], alone["parameters"]) <= 1e-2


def test_a_dynamic_scale_is_halved_when_it_overflows_grows_and_is_saved(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "INTERVAL", 2)
    monkeypatch.setattr(LossScale, "FIRST", 2.0**40)

    def prepared():
        run = TrainingRun(TrainingConfig(precision="fp16", global_batch_size=2))
        run.prepare(
            model=str(folder),
            optimizer=lambda params: torch.optim.AdamW(params),
            data=Sentences(),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10),
            progress=False,
        )
        return run, run._prepared().loss_scale

    run, scale = prepared()
    values, records, num_good = [scale.value], [], 0
    while len(values) < 2 or values[-1] < values[-2] or num_good:
        records.append(run.train_step())
        num_good = 0 if records[-1].skipped else num_good + 1
        factor = 0.5 if records[-1].skipped else 2.0 if num_good == 2 else 1.0
        num_good %= 2
        values.append(values[-1] * factor)
        assert scale.value == values[-1]
        assert len(records) < 60
    assert sum(each.skipped for each in records) > 5
    steps = [each.step for each in records]
    assert steps[-1] == sum(not each.skipped for each in records)
    moved = [one.lr != other.lr for one, other in itertools.pairwise(records)]
    assert moved == [not each.skipped for each in records[:-1]]  # the scheduler, after steps that were not left out
    run.save(tmp_path / "2")
    run, scale = prepared()
    run.load(tmp_path / "2")
    assert scale.value == values[-1]


def test_what_float16_cannot_do_is_refused():
    with pytest.raises(InvalidArgumentError, match="loss_scale is 8, which is for precision"):
        TrainingConfig(loss_scale=8)
    with pytest.raises(InvalidArgumentError, match="loss_scale is -1"):
        TrainingConfig(precision="fp16", loss_scale=-1)
    with pytest.raises(InvalidArgumentError, match="which DeepSpeed refuses on this cpu"):
        TrainingRun(TrainingConfig(strategy="zero2", precision="fp16"))


def test_the_norm_is_the_same_however_gradients_are_divided():
    gradient = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))

    def norm(pieces):
        parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in pieces]
        for parameter, each in zip(parameters, pieces, strict=True):
            parameter.grad = each.clone()
        return norm_and_sums(gradients_of(parameters), [], Processes.join(), num_copies=1)[0]

    exact = float(gradient.double().norm())
    assert norm([gradient]) == pytest.approx(exact, rel=1e-9)  # in float32, 1e-7
    assert norm(gradient.split(350_003)) == pytest.approx(exact, rel=1e-9)  # of ZeRO, anywhere
    assert norm(gradient.split(77)) == pytest.approx(exact, rel=1e-13)
    rows = gradient.view(2500, 20, 20)
    whole = norm([rows])
    assert whole == pytest.approx(float(rows.double().norm()), rel=1e-9)
    assert norm(rows.split(700)) == pytest.approx(whole, rel=1e-13)


def test_what_backward_begins_with_stays_gathered_and_small_layers_go_with_the_root(two, tmp_path):
    save_llama(tmp_path, tie_word_embeddings=False)
    for found in two.run("training.loops:gathers", path=str(tmp_path)):
        told = found["arguments"]
        # The norm before the head, whose few values would be sent alone, is the root's.
        assert told["groups"] == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head", ""]
        assert told["stay_gathered"] == ["lm_head", ""]
        assert found["count"] == 2 * 3 + 2
