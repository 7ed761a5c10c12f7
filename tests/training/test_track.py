"""Trackers: what a run tells them, read back from what they wrote."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from bigmodel.errors import InvalidArgumentError
from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.track import flops_per_position, num_multiplied
from training.loops import Sentences, tracked

STEPS = {"loss", "grad_norm", "lr", "num_tokens", "skipped", "step_s", "memory_bytes", "tokens_per_s"}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "own" / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line(folder, tmp_path):
    found = tracked(str(folder), str(tmp_path))
    first, *lines = lines_of(tmp_path)
    assert first["name"] == "own"
    assert (
        first["hyperparameters"] | {"note": "tried", "global_batch_size": 4, "strategy": "single"}
        == first["hyperparameters"]
    )
    assert first["hyperparameters"]["num_parameters"] == first["hyperparameters"]["num_trained"] > 0
    steps = [each for each in lines if "loss" in each]
    assert [(each["step"], each["loss"], each["grad_norm"]) for each in steps] == found["records"]
    assert all(each.keys() >= STEPS for each in steps)
    assert [each.get("half") for each in steps] == [None, 1.0, None]
    assert found["calls"] == [2]
    assert all(each["tokens_per_s"] * each["step_s"] == pytest.approx(4 * 12) for each in steps)
    assert all(each["memory_bytes"] > 50 << 20 for each in steps)
    after, table = lines[3:]  # images are for trackers that show them
    assert (after["step"], after["after"]) == (3, 7.0)
    assert table["answers"] == {"columns": ["prompt", "text"], "rows": [["a | b", "c"], ["d", 3]]}


def test_the_main_process_alone_writes(two, folder, tmp_path):
    found = two.run("training.loops:tracked", path=str(folder), folder=str(tmp_path), strategy="ddp")
    assert found[0] == found[1]
    _, *lines = lines_of(tmp_path)
    steps = [each for each in lines if "loss" in each]
    assert [each["step"] for each in steps] == [1, 2, 3]
    assert [each["rank"] for each in steps] == [1.0] * 3  # metrics may talk to all processes
    assert steps[0]["tokens_per_s"] * steps[0]["step_s"] == pytest.approx(4 * 12)  # of both


class Kept:
    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple] = []
        self._fails = fails

    def _note(self, verb, *args):
        self.calls.append((verb, *args))
        if verb == self._fails:
            raise OSError("the disk is full")

    def begin(self, name, hyperparameters):
        self._note("begin", name)

    def log(self, values, step):
        self._note("log", step)

    def end(self):
        self._note("end")


def test_ones_own_tracker_and_one_that_fails(folder, tmp_path, caplog):
    whole, failing, never = Kept(), Kept("log"), Kept("begin")
    with caplog.at_level(logging.WARNING, logger="bigmodel.training"):
        found = tracked(str(folder), str(tmp_path), failing, whole, never, "jsonl")
    assert whole.calls == [("begin", "own"), ("log", 1), ("log", 2), ("log", 3), ("log", 3), ("end",)]
    assert failing.calls == [("begin", "own"), ("log", 1)]
    assert never.calls == [("begin", "own")]
    told = [each.getMessage() for each in caplog.records if "tracker" in each.getMessage()]
    end = "and is left out from now on: OSError: the disk is full"
    assert told == [f"tracker Kept failed in {verb} {end}" for verb in ("begin", "log")]
    assert len(found["records"]) == 3
    assert len(lines_of(tmp_path)) == 6


def test_what_is_no_tracker_is_refused(folder, tmp_path):
    run = TrainingRun(TrainingConfig(strategy="single", precision="fp32"))
    run.prepare(model=str(folder), optimizer=torch.optim.SGD, data=Sentences(8), progress=False)
    with (
        pytest.raises(InvalidArgumentError, match=r"There is no tracker 'tensorbord'. There are: jsonl, tensorboard"),
        run.track("tensorbord"),
    ):
        pass
    with pytest.raises(InvalidArgumentError, match="A int is no tracker"), run.track(3):
        pass
    with run.track(folder=tmp_path) as track:
        with pytest.raises(InvalidArgumentError, match="is tracked already"), run.track():
            pass
        with pytest.raises(InvalidArgumentError, match=r"An image has shape \(2, 3\)"):
            track.images("x", [torch.zeros(2, 3)])
        with pytest.raises(InvalidArgumentError, match="outside of 0 to 1"):
            track.images("x", [torch.full((1, 2, 3), 2.0)])
        with pytest.raises(InvalidArgumentError, match="has 1 values, and there are 2 columns"):
            track.table("x", ["a", "b"], [[1]])
    with pytest.raises(InvalidArgumentError, match="every is 0"):
        run.metric(every=0)
    (name,) = tmp_path.iterdir()  # what its checkpoints call it
    assert run._saves.run_id.startswith(name.name)


def test_tensorboard_reads_it(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = tracked(str(folder), str(tmp_path), "tensorboard")
    events = EventAccumulator(str(tmp_path / "own"))
    events.Reload()
    told = [(each.step, each.value) for each in events.Scalars("loss")]
    assert [step for step, _ in told] == [1, 2, 3]
    assert [value for _, value in told] == pytest.approx([loss for _, loss, _ in found["records"]])
    assert {"tokens_per_s", "memory_bytes", "half", "after"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"picture/0", "picture/1"}
    texts = {name: events.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}
    assert '"note": "tried"' in texts["hyperparameters/text_summary"]
    assert "a \\| b" in texts["answers/text_summary"]


def test_flops_of_a_token(folder):
    from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

    with torch.device("meta"):
        tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        layers = sum(each.numel() for each in tied.model.layers.parameters())
        head = tied.lm_head.weight.numel()
        assert num_multiplied(tied) == layers + head + tied.model.norm.weight.numel()
        sizes = {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": 32,
            "num_attention_heads": 2,
        }
        mixture = AutoModelForCausalLM.from_config(
            MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
        )
    experts = 8 * 3 * 8 * 16
    whole = sum(each.numel() for each in mixture.parameters())
    assert num_multiplied(mixture) == whole - 32 * 8 - experts * 6 / 8
    assert flops_per_position(100, 100, 100.0) == 600
    assert flops_per_position(0, 100, 100.0) == 400
