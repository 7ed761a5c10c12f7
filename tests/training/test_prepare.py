"""What prepare takes, gives back and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

import bigmodel
from bigmodel.errors import InvalidArgumentError, TrainingError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Numbers, Sentences, save_llama

FP32 = {"precision": "fp32"}


def run_of(**options):
    return TrainingRun(TrainingConfig(**(FP32 | options)))


def test_objects_come_back_in_the_order_that_they_were_given():
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = LinearLR(optimizer)
    loader = DataLoader(Numbers(), batch_size=4)
    given = scheduler, model, loader, optimizer
    found = run_of().prepare(*given)
    assert found[0].scheduler is scheduler
    assert found[1] is model
    assert len(found[2]) == len(loader)
    assert found[3].optimizer is optimizer
    assert run_of().prepare(nn.Linear(2, 2)).weight.dtype == torch.float32


def test_an_optimizer_that_was_built_before_points_at_the_new_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).to(torch.bfloat16)
    optimizer = AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": [model[1].weight], "lr": 0.25}])
    _, prepared = TrainingRun().prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert isinstance(prepared, torch.optim.Optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    now = {id(each) for each in model.parameters()}
    assert all(id(each) in now for group in optimizer.param_groups for each in group["params"])
    assert all(each.dtype == torch.float32 for each in model.parameters())


def test_a_loaders_batch_size_is_the_micro_batch_and_its_parts_are_kept():
    def collate(samples):
        return {"numbers": [each["number"] for each in samples], "labels": torch.ones(len(samples), 2)}

    loader = DataLoader(Numbers(), batch_size=5, collate_fn=collate)
    found = run_of().prepare(model=nn.Linear(2, 2), data=loader)[1]
    assert [batch["numbers"] for batch in found][:2] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(InvalidArgumentError, match="micro_batch_size is 2, and the DataLoader's batch_size is 5"):
        run_of(micro_batch_size=2).prepare(nn.Linear(2, 2), loader)


def test_frozen_parameters_keep_their_dtype(folder):
    model = bigmodel.load_sharded(folder)
    model.model.layers[0].requires_grad_(True)
    prepared = TrainingRun().prepare(model)
    dtypes = {name: each.dtype for name, each in prepared.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".layers.0." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".layers.0." not in name} == {torch.bfloat16}


def test_weights_of_a_path_are_those_of_the_checkpoint(folder):
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = run_of().prepare(model=str(folder))
    assert type(found) is type(expected)
    assert found.training
    assert found.lm_head.weight is found.model.embed_tokens.weight
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter)
        assert found.get_parameter(name).requires_grad
    for name, buffer in expected.named_buffers():
        assert torch.equal(found.get_buffer(name), buffer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "zero4"}, "strategy is 'zero4'"),
        ({"precision": "int3"}, "precision is 'int3'"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"micro_batch_size": True}, "micro_batch_size is True"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0"),
        ({"replicas": 2}, "strategy"),
        ({"seed": -1}, "seed is -1"),
        ({"drop_last": "yes"}, "drop_last is 'yes'"),
    ],
)
def test_what_means_nothing_is_refused_by_name(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        run_of(**options)


def test_what_cannot_be_prepared_is_refused(folder):
    model = nn.Linear(2, 2)
    stepped = AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    stepped.step()
    other = SGD(nn.Linear(2, 2).parameters())
    for given, words in (
        ((), "no model"),
        ((model, nn.Linear(1, 1)), "second model"),
        ((model, stepped), "has stepped already"),
        ((model, other), "not the model's"),
        ((model, LinearLR(other)), "of another optimizer"),
        ((model, 7), "was given a int"),
        ((model, []), "is empty"),
        ((nn.Linear(2, 2, device="meta"),), "are on meta"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            run_of().prepare(*given)
    with pytest.raises(TrainingError, match="Nothing was prepared"):
        run_of().step()
    run = run_of()
    run.prepare(nn.Linear(2, 2))
    with pytest.raises(InvalidArgumentError, match="called before"):
        run.prepare(nn.Linear(2, 2))


def test_a_model_that_streams_is_refused(folder):
    streamed = bigmodel.load_sharded(folder, device_map={"": "disk"})
    with pytest.raises(InvalidArgumentError, match=r"streams.*materialize"):
        run_of().prepare(streamed)


def test_a_checkpoint_is_made_between_steps(folder, tmp_path):
    run = run_of(global_batch_size=4, micro_batch_size=2)
    model, _, loader = run.prepare(model=str(folder), optimizer=lambda params: SGD(params, lr=0.1), data=Sentences())
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            if not loader.is_last:
                with pytest.raises(TrainingError, match=r"save a checkpoint.*must be stepped"):
                    run.save(tmp_path / "1")
            run.step()
        if loader.is_last:
            break
    run.save(tmp_path / "1")


def test_a_loop_that_steps_the_optimizer_itself_is_told():
    run = run_of()
    _, optimizer = run.prepare(nn.Linear(2, 2), optimizer=lambda params: SGD(params, lr=0.1))
    with pytest.raises(TrainingError, match=r"or call run\.step"):
        optimizer.optimizer.step()


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out():
    run = run_of(grad_clip=1.0)
    model = nn.Linear(1, 1)
    model, _, loader, _ = run.prepare(
        model=model,
        optimizer=lambda params: AdamW(params, lr=0.1),
        data=DataLoader([torch.tensor([value]) for value in (1.0, float("inf"), 1.0)], batch_size=1),
        scheduler=lambda optimizer: LinearLR(optimizer, 0.5, 1.0, 4),
    )
    records, rates, weights = [], [], []
    for batch in loader:
        with run.accumulate():
            run.backward(model(batch).mean())
            run.step()
        records.append(run.last_step)
        rates.append(run.last_step.lr)
        weights.append(float(model.weight.detach()))
    assert [record.skipped for record in records] == [False, True, False]
    assert [record.step for record in records] == [1, 1, 2]
    assert rates[1] == rates[2] > rates[0]
    assert weights[0] == weights[1] != weights[2]


def test_what_the_engine_would_stumble_over_is_refused():
    narrow = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16).requires_grad_(False))
    with pytest.raises(InvalidArgumentError, match="frozen parameters are narrower"):
        run_of().prepare(narrow)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(SGD(nn.Linear(2, 2).parameters()))
    for given, words in (
        ((nn.Linear(2, 2), plateau), "ReduceLROnPlateau"),
        ((nn.Linear(2, 2), DataLoader(Numbers(), batch_size=2, drop_last=True)), "drop_last"),
        (
            (nn.Linear(2, 2), DataLoader(Numbers(), sampler=torch.utils.data.RandomSampler(Numbers(), num_samples=3))),
            "draws 3",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            run_of().prepare(*given)
    with pytest.raises(InvalidArgumentError, match="no use for"):
        run_of(reduce_dtype="bf16")


def test_a_scalar_parameter_trains_in_bfloat16():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(())), nn.Linear(2, 1)

        def forward(self, value):
            return self.inner(value) * self.scale

    run = TrainingRun()
    model, optimizer = run.prepare(Scaled(), optimizer=lambda params: SGD(params, lr=0.1))
    run.backward(model(torch.ones(1, 2)).mean())
    run.step()
    assert float(model.scale.detach()) != 1.0
    assert optimizer.param_groups[0]["params"][0].dtype == torch.float32


def test_modules_that_were_in_eval_mode_stay_so_after_an_evaluation(folder):
    run = TrainingRun(TrainingConfig(micro_batch_size=4))
    model = run.prepare(model=str(folder))
    model.model.layers[0].eval()
    run.evaluate(run.prepare_eval(Sentences()))
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_units_are_those_that_the_user_names(folder):
    def groups(units):
        run = run_of(strategy="fsdp", engine_options={"units": units})
        run.prepare(str(folder), optimizer=lambda params: SGD(params, lr=0.1), progress=False)
        return run.engine_arguments()["groups"]

    layers = ["model.layers.0", "model.layers.1", ""]
    assert groups(["LlamaDecoderLayer"]) == layers
    assert groups(lambda name, module: name.endswith("mlp")) == ["model.layers.0.mlp", "model.layers.1.mlp", ""]
    for units, words in (
        (["GPT2Block"], "has no such module. Its repeated ones are: LlamaDecoderLayer"),
        (["LlamaDecoderLayer", "LlamaMLP"], "inside another"),
        (["Embedding"], "shares a weight with a module outside"),
        (3, "Give names of classes"),
        ([], "Give names of classes"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            groups(units)


def test_float8_is_refused_where_the_device_does_not_multiply_it():
    with pytest.raises(InvalidArgumentError, match="a cpu does not multiply float8"):
        run_of(strategy="fsdp", precision="fp8")
    with pytest.raises(InvalidArgumentError, match='which is for strategy="fsdp"'):
        run_of(strategy="ddp", precision="fp8")
    with pytest.raises(InvalidArgumentError, match="emulate_float8 is for precision"):
        run_of(strategy="fsdp", precision="bf16", engine_options={"emulate_float8": True})


@pytest.mark.parametrize("is_tied", [True, False])
def test_float8_rounds_products_and_leaves_parameters_as_they_are(tmp_path, is_tied):
    save_llama(tmp_path / "llama", tie_word_embeddings=is_tied, vocab_size=96)

    def trained(precision, **options):
        run = run_of(
            strategy="fsdp", precision=precision, global_batch_size=3, micro_batch_size=3, engine_options=options
        )
        loader = run.prepare(
            str(tmp_path / "llama"), optimizer=lambda params: AdamW(params, lr=1e-3), data=Sentences(), progress=False
        )[2]
        assert len(loader) == 22
        return run, [run.train_step().loss for _ in range(4)]  # of 36 tokens, which 16 does not divide

    _, expected = trained("bf16")
    run, losses = trained("fp8", emulate_float8=True)  # no device here multiplies float8
    assert losses != expected
    assert losses == pytest.approx(expected, abs=3e-2)
    layers = run.engine_arguments()["float8"]
    assert len(layers) == 14
    assert "model.layers.0.mlp.up_proj" in layers
    assert not any("lm_head" in each for each in layers)
    assert all(parameter.dtype == torch.float32 for parameter in run.unwrap().parameters())
    run.export(tmp_path / "out")
    assert {each.dtype for each in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


HEAP = """
import sys
import torch
from bigmodel.footprint import footprint_bytes
from bigmodel.training import TrainingConfig, TrainingRun

if sys.argv[1] == "bounded":
    TrainingRun(TrainingConfig(strategy="single"))
torch.ones(30 << 18)  # 30 MiB, freed: from now on glibc itself would serve what is smaller from its heap
held = [torch.ones(6 << 18) for _ in range(40)]
before = footprint_bytes()
del held[::2]
print((before - footprint_bytes()) >> 20)
"""


@pytest.mark.parametrize(
    ("bound", "settings", "least", "most"),
    [
        ("bounded", {}, 110, 130),
        ("bounded", {"MALLOC_MMAP_THRESHOLD_": "67108864"}, -10, 30),  # as the user wishes
        ("unbounded", {}, -10, 30),
    ],
)
def test_what_lies_between_other_tensors_goes_back_when_it_is_freed(bound, settings, least, most):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
    done = subprocess.run(
        [sys.executable, "-c", HEAP, bound], capture_output=True, text=True, env=environment, check=True
    )
    assert least <= int(done.stdout) <= most


HUGE = """
import bigmodel.training
import torch

held = torch.ones(64 << 18)
with open("/proc/self/smaps_rollup") as file:
    print(next(int(line.split()[1]) >> 10 for line in file if line.startswith("AnonHugePages")))
"""


@pytest.mark.parametrize(("setting", "least", "most"), [(None, 48, 80), ("0", 0, 16)])
def test_large_tensors_of_a_training_lie_in_huge_pages_unless_the_user_says_no(setting, least, most):
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this kernel gives no huge pages")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if setting is None else {"THP_MEM_ALLOC_ENABLE": setting}
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, env=environment, check=True)
    assert least <= int(done.stdout) <= most
