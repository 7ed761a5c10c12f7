"""Parameters and optimizer state in host memory: the same bits; what an engine does not offload is refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from bigmodel.errors import InvalidArgumentError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import Sentences, save_llama

BOTH = {"offload_optimizer": "cpu", "offload_params": "cpu"}
OPTIMIZER = {"offload_optimizer": "cpu"}
SLOW = pytest.mark.slow
CASES = [
    ("fsdp", BOTH),
    pytest.param("zero1", OPTIMIZER, marks=SLOW),
    pytest.param("zero2", OPTIMIZER, marks=SLOW),
    pytest.param("zero3", OPTIMIZER, marks=SLOW),
    pytest.param("zero3", {"offload_params": "cpu"}, marks=SLOW),
    ("zero3", BOTH),
]


def equal(found, expected) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=SLOW)])
@pytest.mark.parametrize(("strategy", "offload"), CASES)
def test_what_is_offloaded_trains_to_the_same_bits(two, tmp_path, strategy, offload, precision):
    save_llama(tmp_path, tie_word_embeddings=False)
    asked = {"path": str(tmp_path), "steps": 3, "strategy": strategy, "precision": precision, "micro_batch_size": 2}
    plain, found = (two.run("training.loops:train", **asked, **each)[1] for each in ({}, offload))
    assert found["losses"] == plain["losses"]
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-9)
    assert equal(found["parameters"], plain["parameters"])


@pytest.mark.parametrize("offload", [OPTIMIZER, BOTH])
def test_deepspeed_was_told(folder, offload):
    run = TrainingRun(TrainingConfig(strategy="zero3", precision="fp32", **offload))
    run.prepare(
        model=str(folder), optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Sentences(), progress=False
    )
    zero = run._prepared()._zero
    assert zero.offload_optimizer
    assert zero.offload_param == ("offload_params" in offload)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp", BOTH), ("fsdp", {})),
        pytest.param(("zero3", BOTH), ("zero3", BOTH), marks=SLOW),
        pytest.param(("zero2", OPTIMIZER), ("zero3", {}), marks=SLOW),
        pytest.param(("zero3", {}), ("zero2", OPTIMIZER), marks=SLOW),
    ],
)
def test_a_checkpoint_does_not_know_where_things_lay(two, folder, tmp_path, before, after):
    common = {"precision": "fp32", "micro_batch_size": 2}
    whole = two.run("training.loops:train", path=str(folder), steps=4, strategy=before[0], **common)[0]
    asked = {"path": str(folder), "folder": str(tmp_path / "2"), **common}
    two.run("training.loops:resumed", first=2, then=0, strategy=before[0], **before[1], **asked)
    for found in two.run("training.loops:resumed", first=0, then=2, strategy=after[0], **after[1], **asked):
        assert max(abs(a - b) for a, b in zip(found["losses"], whole["losses"][2:], strict=True)) <= 5e-6
        if before[0] == after[0]:
            assert equal(found["parameters"], whole["parameters"])


def test_a_run_says_what_lies_elsewhere(folder):
    run = TrainingRun(TrainingConfig(strategy="fsdp", precision="fp32", **BOTH))
    run.prepare(model=str(folder), progress=False)
    assert "parameters and optimizer state in host memory" in run._prepared().describe()
    assert "CPUOffloadPolicy" in run.engine_arguments()["offload_policy"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strategy": "ddp", **OPTIMIZER}, 'offload_optimizer is "cpu", and strategy is "ddp". Give strategy="fsdp"'),
        ({"strategy": "fsdp", **OPTIMIZER}, "in one place"),
        ({"strategy": "fsdp", "offload_params": "cpu"}, 'offload_params is "cpu" alone'),
        ({"strategy": "zero2", **BOTH}, "offloads the optimizer alone"),
        ({"strategy": "zero3", "offload_optimizer": "disk"}, "offload_optimizer is 'disk'. Give one of: none, cpu"),
        (
            {"strategy": "zero3", "engine_options": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "zero_optimization.offload_param.device, which other fields",
        ),
        (
            {"strategy": "zero3", "engine_options": {"zero_optimization": {"offload_optimizer": "cpu"}}},
            "offload_optimizer is 'cpu'. It holds settings by name",
        ),
        (
            {
                "strategy": "zero3",
                **OPTIMIZER,
                "engine_options": {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            },
            "offload_optimizer.ratio, which would",
        ),
    ],
)
def test_what_an_engine_does_not_offload_is_refused(options, match):
    with pytest.raises(InvalidArgumentError, match=match.replace("(", r"\(")):
        TrainingConfig(**options)


def test_configurations_of_others_say_what_is_offloaded(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "buffer_count": 5}, "offload_param": {"device": "none"}}
    found = TrainingConfig.read({"zero_optimization": zero, "bf16": {"enabled": True}}, num_processes=1)
    assert (found.offload_optimizer, found.offload_params) == ("cpu", "none")
    assert found.engine_options == {"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}}
    (tmp_path / "a.yaml").write_text(
        json.dumps(
            {"distributed_type": "FSDP", "mixed_precision": "bf16", "fsdp_config": {"fsdp_offload_params": True}}
        )
    )
    found = TrainingConfig.read(tmp_path / "a.yaml", num_processes=1)
    assert (found.strategy, found.offload_optimizer, found.offload_params) == ("fsdp", "cpu", "cpu")
    deepspeed = {"zero_stage": 2, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    found = TrainingConfig.read(
        {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "deepspeed_config": deepspeed}, num_processes=1
    )
    assert (found.strategy, found.offload_optimizer, found.offload_params) == ("zero2", "cpu", "none")
