"""Runs that were interrupted: with any number of processes and any engine they go on as if they had not been."""

from __future__ import annotations

import json

import pytest
import torch

from bigmodel.errors import InvalidArgumentError, MissingFilesError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Sentences, masters, resumed, train
from training.test_engines import largest_difference

SLOW = pytest.mark.slow


OPTIONS = {"precision": "fp32", "micro_batch_size": 2, "groups": True}


@pytest.fixture(scope="module")
def whole(folder):
    """Ten steps of one process, uninterrupted."""
    return train(folder, 10, strategy="single", **OPTIONS)


def test_one_process_goes_on_bit_for_bit(folder, whole, tmp_path):
    first = train(folder, 4, strategy="single", checkpoint=str(tmp_path / "4"), **OPTIONS)
    rest = resumed(str(folder), str(tmp_path / "4"), 0, 6, strategy="single", **OPTIONS)
    assert first["losses"] + rest["losses"] == whole["losses"]
    assert first["tokens"] + rest["tokens"] == whole["tokens"]
    assert all(torch.equal(rest["parameters"][name], each) for name, each in whole["parameters"].items())


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", pytest.param("zero1", marks=SLOW), pytest.param("zero2", marks=SLOW), "zero3"]
)
def test_two_processes_go_on_bit_for_bit(two, folder, tmp_path, strategy):
    asked = {"strategy": strategy, **OPTIONS}
    uninterrupted, _ = two.run("training.loops:train", path=str(folder), steps=6, **asked)
    two.run("training.loops:resumed", path=str(folder), folder=str(tmp_path / "3"), first=3, then=0, **asked)
    for found in two.run(
        "training.loops:resumed", path=str(folder), folder=str(tmp_path / "3"), first=0, then=3, **asked
    ):
        assert found["losses"] == uninterrupted["losses"][3:]
        assert all(torch.equal(found["parameters"][name], each) for name, each in uninterrupted["parameters"].items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "single"),
        pytest.param("single", "fsdp", marks=SLOW),
        pytest.param("fsdp", "ddp", marks=SLOW),
        pytest.param("ddp", "fsdp", marks=SLOW),
        ("fsdp", "zero3"),
        ("zero3", "fsdp"),
        pytest.param("zero2", "zero3", marks=SLOW),
        pytest.param("zero1", "ddp", marks=SLOW),
        pytest.param("ddp", "zero2", marks=SLOW),
        pytest.param("zero3", "zero1", marks=SLOW),
        pytest.param("single", "zero3", marks=SLOW),
    ],
)
def test_another_engine_and_number_of_processes_go_on(two, folder, whole, tmp_path, before, after):
    def run(strategy, **more):
        asked = {"path": str(folder), "folder": str(tmp_path / "4"), "strategy": strategy, **OPTIONS, **more}
        return resumed(**asked) if strategy == "single" else two.run("training.loops:resumed", **asked)[0]

    run(before, first=4, then=0)
    found = run(after, first=0, then=6)
    assert max(abs(a - b) for a, b in zip(found["losses"], whole["losses"][4:], strict=True)) <= 2e-6
    assert largest_difference(found["parameters"], whole["parameters"]) <= 5e-6


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
def test_what_is_exported_is_what_was_trained(two, folder, tmp_path, strategy):
    from transformers import AutoModelForCausalLM

    parameters, _ = two.run(
        "training.loops:exported", path=str(folder), folder=str(tmp_path / "out"), strategy=strategy, micro_batch_size=2
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    for name, trained in parameters.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], trained.to(torch.bfloat16))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def prepared(folder, **options):
    run = TrainingRun(TrainingConfig(precision="fp32", **options))
    run.prepare(model=str(folder), optimizer=lambda params: torch.optim.AdamW(params), progress=False)
    return run


def test_the_newest_stay_and_nothing_else_is_removed(folder, tmp_path):
    run, other = prepared(folder), prepared(folder)
    other.save(tmp_path / "of-another-run")
    (tmp_path / "notes").mkdir()
    for step in range(4):
        run._num_steps = step
        run.save(tmp_path / str(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "notes", "of-another-run"]
    assert run.load_last(tmp_path) == tmp_path / "3"
    assert prepared(folder).load_last(tmp_path / "notes") is None


def test_a_checkpoint_that_is_not_complete_is_refused_and_passed_over(folder, tmp_path):
    run = prepared(folder)
    run.save(tmp_path / "1")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "state.pt").write_bytes(b"torn")
    with pytest.raises(MissingFilesError, match="no complete checkpoint"):
        run.load(tmp_path / "2")
    assert run.load_last(tmp_path) == tmp_path / "1"
    with pytest.raises(InvalidArgumentError, match="is no checkpoint"):
        run.save(tmp_path / "2")


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(folder, tmp_path):
    prepared(folder).save(tmp_path / "1")
    run = TrainingRun(TrainingConfig(precision="fp32"))
    run.prepare(torch.nn.Linear(2, 2), optimizer=lambda params: torch.optim.AdamW(params))
    with pytest.raises(TrainingError, match="another model"):
        run.load(tmp_path / "1")
    manifest = tmp_path / "1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(TrainingError, match="version 99"):
        prepared(folder).load(tmp_path / "1")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_saved_and_exported_after_an_evaluation_are_the_masters(folder, tmp_path, precision):
    run = TrainingRun(TrainingConfig(precision=precision, micro_batch_size=4, global_batch_size=8))
    model, _, loader = run.prepare(
        model=str(folder), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), data=Sentences(), progress=False
    )
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if run.last_step is not None:
            break
    expected = masters(run)
    assert {each.dtype for each in expected.values()} == {torch.float32}
    run.evaluate(run.prepare_eval(Sentences()))
    run.save(tmp_path / "1")
    run.evaluate(run.prepare_eval(Sentences()))
    run.load(tmp_path / "1")
    found = masters(run)
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_the_one_that_was_written_last_is_the_newest_and_stays(folder, tmp_path):
    run = prepared(folder)
    for step in (100, 200, 300):
        run._num_steps = step
        run.save(tmp_path / str(step))
    run.load(tmp_path / "100")
    run._num_steps = 150
    run.save(tmp_path / "150", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["150", "300"]
    assert run.load_last(tmp_path) == tmp_path / "150"


def test_folders_of_other_programs_are_left_alone(folder, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a page"}')
    run = prepared(folder)
    with pytest.raises(InvalidArgumentError, match="is no checkpoint"):
        run.save(site)
    run.save(tmp_path / "1", keep=1)
    assert run.load_last(tmp_path) == tmp_path / "1"
    assert [path.name for path in site.iterdir()] == ["manifest.json"]


def test_numbers_of_numpy_are_saved_and_what_cannot_be_is_told_before(folder, tmp_path):
    import numpy as np

    class Strange:
        def state_dict(self):
            return {"made": object()}

        def load_state_dict(self, state):
            """Nothing."""

    run = TrainingRun(TrainingConfig(precision="fp32"))
    run.prepare(
        model=str(folder),
        optimizer=lambda params: torch.optim.AdamW(params),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(step))),
        progress=False,
    )
    run.save(tmp_path / "1")
    run.load(tmp_path / "1")
    run.register_for_checkpointing(Strange())
    with pytest.raises(TrainingError, match="cannot be saved"):
        run.save(tmp_path / "1")
    assert run.load_last(tmp_path / "nowhere") is None
    assert json.loads((tmp_path / "1" / "manifest.json").read_text())["step"] == 0


def test_a_checkpoint_that_does_not_fit_changes_nothing(folder, tmp_path):
    saved = TrainingRun(TrainingConfig(precision="fp32"))
    saved.prepare(
        model=str(folder), optimizer=lambda params: torch.optim.AdamW(params), data=Sentences(), progress=False
    )
    saved._num_steps = 7
    saved.save(tmp_path / "7")
    for wrong in ("optimizer", "class", "data", "registered"):
        run = TrainingRun(TrainingConfig(precision="fp32", seed=1))
        model, *_, loader = run.prepare(
            model=str(folder),
            optimizer=lambda params, wrong=wrong: (torch.optim.Adam if wrong == "class" else torch.optim.AdamW)(
                params[1:] if wrong == "optimizer" else params
            ),
            data=Sentences(9 if wrong == "data" else 64),
            progress=False,
        )
        if wrong == "registered":
            run.register_for_checkpointing(torch.nn.Linear(1, 1))
        with torch.no_grad():
            before = model.model.norm.weight.add_(1).clone()
        cursor, draws = loader.cursor, torch.get_rng_state()
        with pytest.raises(TrainingError):
            run.load(tmp_path / "7")
        assert torch.equal(model.model.norm.weight, before)
        assert (loader.cursor, run._num_steps) == (cursor, 0)
        assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_what_is_written_beside_training_is_what_was_there(two, folder, tmp_path, strategy):
    found = two.run("training.loops:saved_beside", path=str(folder), folder=str(tmp_path), strategy=strategy)
    assert found == [{"equal": True, "names": ["b"], "losses": True}] * 2


def test_what_goes_wrong_while_training_goes_on_is_told_by_the_next_save(folder, tmp_path, caplog):
    run = prepared(folder)
    run.save(tmp_path / "0", wait=False)
    run.wait_for_saving()
    run.register_for_checkpointing(Unsavable())
    run.save(tmp_path / "1", wait=False)
    with pytest.raises(TrainingError, match="cannot be saved"):
        run.save(tmp_path / "2")
    assert "was not written" in caplog.text
    assert prepared(folder).load_last(tmp_path) == tmp_path / "0"


class Unsavable:
    def state_dict(self):
        return {"made": range(3)}

    def load_state_dict(self, state):
        """Nothing."""


@pytest.mark.parametrize("wait", [True, False])
def test_hooks_write_files_that_are_there_whenever_the_checkpoint_is(tmp_path, wait):
    def prepared(**hooks):
        run = TrainingRun(TrainingConfig(precision="fp32"))
        run.prepare(model=torch.nn.Linear(2, 2), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        run.register_checkpoint_hooks(**hooks)
        return run

    def write(folder):
        (folder / "mine").mkdir()
        (folder / "mine" / f"rank-{run.processes.rank}.txt").write_text("of this process")

    run = prepared(on_save=write)
    run.save(tmp_path / "1", wait=wait)
    run.wait_for_saving()
    read = []
    run = prepared(on_load=lambda folder: read.append((folder / "mine" / "rank-0.txt").read_text()))
    run.load(tmp_path / "1")
    assert read == ["of this process"]

    def fails(folder):
        raise ValueError("no room")

    run = prepared(on_save=fails)
    with pytest.raises(ValueError, match="no room"):
        run.save(tmp_path / "2")
    assert not (tmp_path / "2").exists()
    with pytest.raises(InvalidArgumentError, match="on_load is a str"):
        prepared(on_load="folder")
    run = prepared(on_save=lambda folder: (folder / "random-0.pt").write_text("mine"))
    with pytest.raises(InvalidArgumentError, match=r"wrote random-0\.pt, which a checkpoint has itself"):
        run.save(tmp_path / "2")
    assert not (tmp_path / "2").exists()
    run = prepared(on_load=fails)
    with pytest.raises(ValueError, match="no room"):
        run.load(tmp_path / "1")


def test_hooks_run_in_every_process(two, tmp_path):
    found = two.run("training.loops:hooked", folder=str(tmp_path / "1"))
    assert found == [["rank-0.txt", "rank-1.txt"]] * 2
