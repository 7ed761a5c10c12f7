"""What a loop says to its processes, and loops in the words of other libraries."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Sentences, generated, masters, train
from training.test_engines import largest_difference


def test_values_of_two_processes(two):
    first, second = two.run("training.loops:said")
    for found in (first, second):
        assert found["gathered"]["rows"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["gathered"]["nested"][0].tolist() == [0.5, 1.5]
        assert found["halves"].dtype == torch.float16
        assert found["halves"].item() == 60000.0  # whose sum float16 does not hold
        assert found["mean"].item() == 1.5
        assert found["broadcast"].tolist() == [1, 1, 1]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["padded"].shape == (2, 3)
        assert found["refused"] == ["InvalidArgumentError"] * 4
        assert found["drawn"] == first["drawn"]
    assert [each["scattered"].tolist() for each in (first, second)] == [[0, 1], [2, 3]]
    assert [each["split"] for each in (first, second)] == [["a", "b"], ["c"]]
    assert [each["padded_split"] for each in (first, second)] == [["a", "b"], ["c", "c"]]
    assert second["padded"].tolist()[1][2] == 9
    assert first["padded"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert [each["on_main"] for each in (first, second)] == ["done", None]
    assert [each["failed"] for each in (first, second)] == ["ValueError", "TrainingError"]


def test_one_process_talks_to_itself():
    run = TrainingRun(TrainingConfig(precision="fp32"))
    rows = torch.arange(4.0).view(2, 2)
    assert torch.equal(run.gather({"rows": rows})["rows"], rows)
    assert run.gather_objects(3) == [3]
    assert torch.equal(run.reduce(rows, "mean"), rows)
    assert torch.equal(run.broadcast([rows])[0], rows)
    assert torch.equal(run.scatter(rows), rows)
    with run.split_between_processes({"a": [1, 2], "b": rows}) as mine, run.main_process_first():
        assert mine["a"] == [1, 2]
    with pytest.raises(TrainingError, match="No micro-batch was given yet"):
        run.gather_for_metrics(rows)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_loop_that_does_not_say_where_it_accumulates_comes_to_the_same(two, folder, strategy):
    asked = {"path": str(folder), "strategy": strategy, "precision": "fp32", "micro_batch_size": 2}
    expected = two.run("training.loops:train", steps=4, **asked)
    found = two.run("training.loops:in_other_words", steps=4, accumulates=False, **asked)
    for one, other in zip(found, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)) <= 5e-6
        assert largest_difference(one["parameters"], other["parameters"]) <= 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_loop_in_accelerates_words_does_the_same(two, folder, strategy):
    asked = {"path": str(folder), "strategy": strategy, "precision": "fp32", "micro_batch_size": 2}
    expected = two.run("training.loops:train", steps=4, **asked)
    found = two.run("training.loops:in_other_words", steps=4, **asked)
    for one, other in zip(found, expected, strict=True):
        assert one["losses"] == other["losses"]
        assert one["lrs"] == pytest.approx([0.0005, 0.00055, 0.0006, 0.00065])
        assert all(torch.equal(one["parameters"][name], each) for name, each in other["parameters"].items())


def test_a_step_as_one_verb_is_the_loop(folder):
    expected = train(folder, 20, strategy="single", precision="fp32", micro_batch_size=2)
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=2, grad_clip=1.0))
    run.prepare(
        model=str(folder),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        data=Sentences(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10),
        progress=False,
    )
    assert [run.train_step().loss for _ in range(20)] == expected["losses"]  # over two epochs and a half
    assert all(torch.equal(each, expected["parameters"][name]) for name, each in masters(run).items())


def test_metrics_come_in_the_order_of_the_data_without_what_fills_places(two):
    for found in two.run("training.loops:metrics"):
        assert found["evaluated"] == list(range(7))
        assert found["named"] == [str(each) for each in range(7)]
        assert sorted(found["trained"]) == list(range(7))
        assert found["refused"] == "InvalidArgumentError"


def test_all_processes_stop_after_the_same_step(two, folder):
    found = two.run("training.loops:stopped", path=str(folder))
    assert found == [3, 3]  # one of them asked during the third step


def small(**options):
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=2, micro_batch_size=1, **options))
    return run, run.prepare(
        model=torch.nn.Linear(2, 1), optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=[torch.ones(2)] * 8
    )


def test_a_signal_ends_the_loop_after_a_step():
    before = signal.getsignal(signal.SIGTERM)
    try:
        run, (model, _, loader) = small()
        num_batches = 0
        for batch in loader:
            if run.should_stop:
                break
            if num_batches == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            with run.accumulate():
                run.backward(model(batch).mean())
                run.step()
            num_batches += 1
        assert num_batches == 4
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_profile_is_written_where_it_was_asked_for(tmp_path):
    run, _ = small()

    def forward(model, batch):
        return {"loss": model(batch).mean()}

    with run.profile(tmp_path / "traces") as profiler:
        torch.ones(4).sum()
    assert any("sum" in event.key for event in profiler.key_averages())
    assert (tmp_path / "traces" / "rank-0.json").stat().st_size > 100


def test_what_a_prepared_optimizer_does_not_do_is_refused():
    run, (model, optimizer, _) = small()
    with pytest.raises(TrainingError, match="without one"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TrainingError, match="after prepare"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(TrainingError, match="that prepare was given was stepped"):
        optimizer.optimizer.step()
    optimizer.step()  # there were no gradients: nothing
    assert run.last_step is None
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(InvalidArgumentError, match="1 of 2 parameters"):
        run.clip_grad_norm_([model.weight], 1.0)
    assert run.sync_gradients


def test_a_scheduler_that_the_loop_steps_once_an_epoch_is_stepped_so():
    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=2))
    model, optimizer, loader, scheduler = run.prepare(
        model=torch.nn.Linear(2, 1),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        data=[torch.ones(2)] * 8,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    rates = []
    for _ in range(3):
        for batch in loader:
            with run.accumulate():
                run.backward(model(batch).mean())
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.25, 0.125]
    assert run.last_step.step == 12


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ddp"},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "reshard_after_forward": False},
        pytest.param({"strategy": "zero3"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_text_is_generated_between_steps_the_same_in_every_engine(two, folder, options):
    found = two.run("training.loops:generated", path=str(folder), **options)
    expected = generated(str(folder), strategy="single")  # with the first process's prompt
    assert found[0] == expected
    assert [len(each) for each in found[1]] == [10, 10]  # the other goes on for longer
    assert expected[0] != expected[1]


def test_what_has_no_generate_is_refused():
    run, _ = small()
    with pytest.raises(InvalidArgumentError, match="A Linear has no generate"):
        run.generate(torch.ones(1))
