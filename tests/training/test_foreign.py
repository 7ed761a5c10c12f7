"""Configurations that others wrote."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from bigmodel.errors import InvalidArgumentError, MissingFilesError
from bigmodel.training import TrainingConfig, TrainingRun
from training.loops import save_llama

# As transformers' documentation has it, with what is filled in by its Trainer.
ZERO2 = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "allgather_bucket_size": 200000,
        "overlap_comm": False,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "none"},
        "offload_param": None,
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 2,
    "wall_clock_breakdown": False,
}
FSDP = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: true
"""
DEEPSPEED = """
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_clipping: 0.5
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero_stage: 3
mixed_precision: 'no'
num_processes: 8
"""


def test_a_deepspeed_json_is_read_and_what_is_not_ours_goes_through(tmp_path, caplog):
    (tmp_path / "ds.json").write_text(json.dumps(ZERO2))
    with caplog.at_level(logging.INFO, logger="bigmodel.training"):
        found = TrainingConfig.read(tmp_path / "ds.json", num_processes=2, seed=3)
    assert (found.strategy, found.precision, found.grad_clip, found.seed) == ("zero2", "bf16", 1.0, 3)
    assert (found.global_batch_size, found.micro_batch_size) == (16, 2)
    assert found.engine_options == {
        "wall_clock_breakdown": False,
        "zero_optimization": {"allgather_bucket_size": 200000, "overlap_comm": False},
    }
    assert "wall_clock_breakdown, zero_optimization.allgather_bucket_size" in caplog.text


def test_what_goes_through_reaches_deepspeed(tmp_path):
    save_llama(tmp_path / "llama")
    run = TrainingRun(TrainingConfig.read(ZERO2, num_processes=1))
    run.prepare(model=str(tmp_path / "llama"), optimizer=lambda params: torch.optim.AdamW(params), progress=False)
    given = run.engine_arguments()
    assert json.loads(json.dumps(given)) == given
    assert given["zero_optimization"] == {"stage": 2, "allgather_bucket_size": 200000, "overlap_comm": False}
    assert run._prepared().model.zero_allgather_bucket_size() == 200000


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_batch_size": 10}, r"train_batch_size is 10, .* 2 x 4 x 2 = 16"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": "auto"}, "4 passes of 2 processes do not divide"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": "auto"}}}, r"AdamW\(lr=3e-05\)"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}},
            "offload_param asks for tape. Set its device to cpu, nvme or none",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "there is no nvme_folder"),
        ({"zero_optimization": {"stage": 5}}, "stage is 5"),
        ({"fp16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype is bf16"),
        ({"gradient_accumulation_steps": "four"}, "gradient_accumulation_steps is 'four'"),
        ({"zero_optimization": [2]}, "zero_optimization is"),
        (
            {"train_micro_batch_size_per_gpu": "auto"},
            "gradient_accumulation_steps is 4, and the micro-batch is not stated",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size",
        ),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast, which would"),
    ],
)
def test_what_a_deepspeed_json_cannot_mean_here_is_refused(changes, match):
    with pytest.raises(InvalidArgumentError, match=match):
        TrainingConfig.read(ZERO2 | changes, num_processes=2)


def test_accelerates_yaml_is_read(tmp_path):
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    found = TrainingConfig.read(tmp_path / "fsdp.yaml")
    assert (found.strategy, found.precision, found.reshard_after_forward) == ("fsdp", "bf16", False)
    (tmp_path / "deepspeed.yaml").write_text(DEEPSPEED)
    found = TrainingConfig.read(tmp_path / "deepspeed.yaml")
    assert (found.strategy, found.precision, found.grad_clip) == ("zero3", "fp32", 0.5)
    (tmp_path / "fsdp.yaml").write_text(FSDP + "gradient_accumulation_steps: 4\n")
    found = TrainingConfig.read(tmp_path / "fsdp.yaml", num_processes=2, micro_batch_size=3)
    assert found.global_batch_size == 24
    (tmp_path / "ds.json").write_text(json.dumps(ZERO2))
    named = "distributed_type: DEEPSPEED\nmixed_precision: bf16\ndeepspeed_config: {deepspeed_config_file: ds.json}\n"
    (tmp_path / "named.yaml").write_text(named)
    assert TrainingConfig.read(tmp_path / "named.yaml", num_processes=1).strategy == "zero2"
    (tmp_path / "named.yaml").write_text(named.replace("bf16", "fp16"))
    with pytest.raises(InvalidArgumentError, match=r"mixed_precision is fp16, and ds.json says bf16"):
        TrainingConfig.read(tmp_path / "named.yaml", num_processes=1)


def test_files_that_say_something_else_are_refused(tmp_path):
    with pytest.raises(MissingFilesError, match="could not be read"):
        TrainingConfig.read(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="is no json file"):
        TrainingConfig.read(tmp_path / "torn.json")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InvalidArgumentError, match="holds a list"):
        TrainingConfig.read(tmp_path / "list.yaml")
    (tmp_path / "fsdp.yaml").write_text(FSDP.replace("fsdp_version: 2", "fsdp_flavour: 2"))
    with pytest.raises(InvalidArgumentError, match="fsdp_flavour: not known here"):
        TrainingConfig.read(tmp_path / "fsdp.yaml")
    (tmp_path / "fsdp.yaml").write_text(FSDP.replace("FSDP\n", "MEGATRON_LM\n"))
    with pytest.raises(InvalidArgumentError, match="distributed_type is MEGATRON_LM"):
        TrainingConfig.read(tmp_path / "fsdp.yaml")
    with pytest.raises(InvalidArgumentError, match="precision is 'fp32', and the settings say 'bf16'"):
        TrainingConfig.read(ZERO2, num_processes=1, precision="fp32")


def test_options_of_an_engine(two):
    with pytest.raises(InvalidArgumentError, match=r"engine_options has gradient_clipping, zero_optimization.stage"):
        TrainingConfig(strategy="zero1", engine_options={"gradient_clipping": 1, "zero_optimization": {"stage": 2}})
    with pytest.raises(InvalidArgumentError, match='strategy="ddp" has none'):
        TrainingConfig(strategy="ddp", engine_options={"bucket": 1})
    with pytest.raises(InvalidArgumentError, match=r"Those of \"fsdp\" are: prefetch"):
        TrainingConfig(strategy="fsdp", engine_options={"ahead": 1})
    for found in two.run("training.loops:prefetched"):
        assert found["arguments"]["prefetch"] == 2
        assert found["arguments"]["groups"][0] == "0"
        assert found["same"]


def test_layers_that_accelerate_names_are_the_units():
    import yaml

    settings = yaml.safe_load(FSDP)
    settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer, LlamaMLP"
    config = TrainingConfig.read(settings, global_batch_size=2)
    assert config.engine_options == {"units": ["LlamaDecoderLayer", "LlamaMLP"]}
    both = TrainingConfig.read(settings, global_batch_size=2, engine_options={"prefetch": 2})
    assert both.engine_options == {"units": ["LlamaDecoderLayer", "LlamaMLP"], "prefetch": 2}
    with pytest.raises(InvalidArgumentError, match="engine_options is"):
        TrainingConfig.read(settings, global_batch_size=2, engine_options={"units": ["LlamaMLP"]})
    settings["fsdp_config"]["fsdp_auto_wrap_policy"] = "SIZE_BASED_WRAP"
    assert not TrainingConfig.read(settings, global_batch_size=2).engine_options


def test_settings_of_a_precision_are_refused_or_told(caplog):
    for section, words in (
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
        ({"fp16": {"enabled": True, "auto_cast": True}}, r"fp16\.auto_cast"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            TrainingConfig.read(section)
    with caplog.at_level(logging.INFO, "bigmodel.training"):
        TrainingConfig.read(ZERO2)
    assert (
        "left out, because TrainingConfig's precision and loss_scale say what is done: fp16.loss_scale_window"
        in caplog.text
    )


def test_activation_checkpointing_of_accelerate_is_ours():
    for stated, expected in ((True, "on"), ("true", "on"), (False, "auto")):
        settings = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_activation_checkpointing": stated}}
        assert TrainingConfig.read(settings, num_processes=2).activation_checkpointing == expected
