"""Parameters and optimizer state in host memory: the same bits; what an engine does not offload is refused by name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigmodel.errors import DoesNotFitError, InvalidArgumentError
from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.processes import Processes
from bigmodel.training.swap import SwapFolder
from training.loops import Sentences, masters, save_llama

BOTH = {"offload_optimizer": "cpu", "offload_params": "cpu"}
OPTIMIZER = {"offload_optimizer": "cpu"}
SLOW = pytest.mark.slow
READER = pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="DeepSpeed compiles against libaio")
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


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Of whose halves some are above a MiB, and go to the disk, and some stay."""
    path = tmp_path_factory.mktemp("wide")
    save_llama(path, hidden_size=768, intermediate_size=2048, vocab_size=1501, tie_word_embeddings=False)
    return path


@READER
@pytest.mark.long  # compiles DeepSpeed's reader: minutes, once
@pytest.mark.parametrize(
    ("offload", "precision"), [(OPTIMIZER, "fp32"), ({"offload_params": "cpu"}, "bf16"), (BOTH, "bf16"), (BOTH, "fp32")]
)
def test_what_lies_on_a_disk_trains_to_the_same_bits(two, wide, tmp_path, offload, precision):
    common = {"path": str(wide), "strategy": "zero3", "precision": precision}
    plain = two.run("training.loops:interrupted", folder=str(tmp_path / "1"), **common)[0]
    on_disk = dict.fromkeys(offload, "nvme") | {"nvme_folder": str(tmp_path / "nvme")}
    found = two.run("training.loops:interrupted", folder=str(tmp_path / "2"), **on_disk, **common)[0]
    assert found["losses"] == plain["losses"]
    assert found["ids"] == plain["ids"]
    assert equal(found["parameters"], plain["parameters"])
    assert list((tmp_path / "nvme").glob("*/zero_stage_3"))
    for options in (on_disk, {}):  # its checkpoint, there and elsewhere
        asked = {"steps": 1, "checkpoint": str(tmp_path / "1"), "resumes": True, **common}
        expected, found = (two.run("training.loops:train", **asked, **each)[0] for each in ({}, options))
        assert found["losses"] == expected["losses"]
        assert equal(found["parameters"], expected["parameters"])


class Branches(torch.nn.Module):
    """Two maps, of which `taken` are used."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Linear(768, 768, bias=False) for _ in range(2))
        self.taken = "ab"

    def forward(self, number, labels):
        given = number.float()[:, None].expand(-1, 768) + 1
        return {"loss": sum(getattr(self, name)(given).square().mean() for name in self.taken)}


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, number):
        return {"number": torch.tensor(number), "labels": torch.ones(2, dtype=torch.int64)}


NVME = pytest.param("zero3", {"offload_optimizer": "nvme"}, marks=[pytest.mark.long, READER])
ZERO = [(f"zero{stage}", offload) for stage in (1, 2, 3) for offload in ({}, OPTIMIZER)]


def branches(tmp_path, offload, **options):
    if "nvme" in offload.values():
        offload = {**offload, "nvme_folder": tmp_path}
    run = TrainingRun(TrainingConfig(precision="fp32", **options, **offload))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Branches()
    model, _, loader = run.prepare(
        model=module, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3), data=Numbers(), progress=False
    )
    return run, module, model, loader


@pytest.mark.parametrize(("strategy", "offload"), [*ZERO, NVME], ids=str)
def test_zero_does_not_step_again_with_the_gradients_of_the_step_before(tmp_path, strategy, offload):
    run, module, *_ = branches(tmp_path, offload, strategy=strategy)
    run.train_step()
    first = masters(run)
    module.taken = "a"
    run.train_step()
    second = masters(run)
    assert not torch.equal(second["a.weight"], first["a.weight"])
    assert torch.equal(second["b.weight"], first["b.weight"])


@pytest.mark.parametrize(("strategy", "offload"), [*ZERO, NVME], ids=str)
@pytest.mark.parametrize("taken", [("ab", "a"), ("a", "ab")], ids=str)
def test_gradients_count_that_one_pass_of_two_makes(tmp_path, strategy, offload, taken):
    found = []
    for options, there in (({"strategy": "single"}, {}), ({"strategy": strategy}, offload)):
        run, module, model, loader = branches(tmp_path, there, global_batch_size=2, micro_batch_size=1, **options)
        for number, batch in zip(range(6), loader, strict=False):
            module.taken = taken[number % 2]
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
        found.append(masters(run))
    assert all(torch.allclose(each, found[0][name], rtol=1e-5) for name, each in found[1].items())


@READER
@pytest.mark.long
def test_what_is_frozen_lies_on_the_disk_too(tmp_path):
    run = TrainingRun(TrainingConfig(strategy="zero3", precision="fp32", offload_params="nvme", nvme_folder=tmp_path))
    module = Branches()
    module.b.requires_grad_(False)
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    run.prepare(model=module, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3), data=Numbers(), progress=False)
    run.train_step()
    after = masters(run)
    assert torch.equal(after["b.weight"], before["b.weight"])
    assert not torch.equal(after["a.weight"], before["a.weight"])


def test_a_folder_on_a_disk_is_its_process_s_own_and_goes_with_it(tmp_path):
    asked = {"disk_bytes": 1 << 20, "locked_bytes": 0}
    made = [SwapFolder.make(tmp_path, Processes.join(), **asked) for _ in range(2)]
    assert made[0].path != made[1].path
    assert all(each.path.parent == tmp_path and each.read_bytes_per_s > 0 < each.write_bytes_per_s for each in made)
    script = (
        "import sys, os\nfrom bigmodel.training.swap import SwapFolder\nfrom bigmodel.training.processes import Processes\n"
        f"made = SwapFolder.make({str(tmp_path)!r}, Processes.join(), disk_bytes=1, locked_bytes=0)\n"
        "print(made.path, flush=True)\n"
        "os.fork() == 0 and sys.exit()\n"  # nothing of a process is removed by one that was forked from it
        "os.wait()\nassert made.path.exists()\n"
        "len(sys.argv) > 1 and os.kill(os.getpid(), 9)\n"
    )
    ended, killed = (
        Path(subprocess.run([sys.executable, "-c", script, *more], stdout=subprocess.PIPE, text=True).stdout.strip())
        for more in ([], ["killed"])
    )
    assert ended.parent == killed.parent == tmp_path
    assert not ended.exists()
    assert killed.exists()
    first = made[0].path
    made.pop(0)
    assert not first.exists()
    SwapFolder.make(tmp_path, Processes.join(), **asked)
    assert list(tmp_path.iterdir()) == [made[0].path]


def test_what_a_disk_cannot_do_is_refused_and_nothing_is_left(tmp_path):
    here = Processes.join()
    with pytest.raises(DoesNotFitError, match="will be kept there") as caught:
        SwapFolder.make(tmp_path, here, disk_bytes=1 << 60, locked_bytes=0)
    assert caught.value.tier == "disk"
    assert caught.value.available_bytes < caught.value.needed_bytes == 1 << 60
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match="cannot be written to"):
        SwapFolder.make(tmp_path / "file", here, disk_bytes=0, locked_bytes=0)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_disk_whose_smallest_block_is_larger_than_deepspeed_s_is_refused(tmp_path, monkeypatch, call):
    real = getattr(os, call)

    def as_of_4096(descriptor, buffers, offset):
        if offset % 4096 or any(each.nbytes % 4096 if isinstance(each, memoryview) else 0 for each in buffers):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, call, as_of_4096)
    with pytest.raises(InvalidArgumentError, match="O_DIRECT: Invalid argument"):
        SwapFolder.make(tmp_path, Processes.join(), disk_bytes=0, locked_bytes=0)
    assert not list(tmp_path.iterdir())


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
        (
            {"strategy": "zero3", "offload_optimizer": "disk"},
            "offload_optimizer is 'disk'. Give one of: none, cpu, nvme",
        ),
        ({"strategy": "zero3", "offload_optimizer": "nvme"}, "there is no nvme_folder"),
        ({"strategy": "zero3", **OPTIMIZER, "nvme_folder": 3}, "nvme_folder is 3"),
        ({"strategy": "zero3", **OPTIMIZER, "nvme_folder": "x"}, "nothing is offloaded there"),
        ({"strategy": "zero2", "offload_optimizer": "nvme", "nvme_folder": "x"}, 'offloads to "cpu" alone'),
        (
            {"strategy": "fsdp", "offload_optimizer": "nvme", "offload_params": "nvme", "nvme_folder": "x"},
            'offloads to "cpu" alone',
        ),
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
    on_disk = {"device": "nvme", "nvme_path": "/mnt/fast"}
    zero = {"stage": 3, "offload_optimizer": {**on_disk, "pipeline_read": True}, "offload_param": on_disk}
    found = TrainingConfig.read({"zero_optimization": zero, "aio": {"queue_depth": 16}}, num_processes=1)
    assert (found.offload_optimizer, found.offload_params, found.nvme_folder) == ("nvme", "nvme", "/mnt/fast")
    assert found.engine_options == {
        "zero_optimization": {"offload_optimizer": {"pipeline_read": True}},
        "aio": {"queue_depth": 16},
    }
    deepspeed = {"zero_stage": 3, "offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/mnt/fast"}
    found = TrainingConfig.read({"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}, num_processes=1)
    assert (found.offload_optimizer, found.offload_params, found.nvme_folder) == ("nvme", "none", "/mnt/fast")
    with pytest.raises(InvalidArgumentError, match="one folder"):
        TrainingConfig.read(
            {"zero_optimization": {**zero, "offload_param": {"device": "nvme", "nvme_path": "/mnt/other"}}},
            num_processes=1,
        )
