"""What a step of training takes is known before anything is read, and what is left open is chosen by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import bigmodel
from bigmodel.cli import app
from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.rates import Rates
from bigmodel.errors import DoesNotFitError
from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.choice import outlook_of
from bigmodel.training.cluster import Cluster
from bigmodel.training.forecast import Way, forecast
from bigmodel.training.job import job_of
from bigmodel.training.weights import Origin
from training.loops import Sentences, save_llama

RATES = Rates.roofline(20e9, {"float32": 1e11, "bfloat16": 1e11}, op_s=1e-6)
GIB = 1 << 30


def cluster(num_processes=2, limit_bytes=64 * GIB, **options):
    asked = {"rates": RATES, "host_rates": RATES, "limit_bytes": limit_bytes, "host_limit_bytes": 64 * GIB, **options}
    return Cluster(num_per_node=num_processes, **asked)


def accelerators(num_processes=8, limit_bytes=64 * GIB, **options):
    fast = Rates.roofline(2e12, {"float32": 5e13, "bfloat16": 4e14}, op_s=5e-6)
    return cluster(num_processes, limit_bytes, is_host=False, rates=fast, link_bytes_per_s=2e11, **options)


@pytest.fixture(scope="module")
def job(folder):
    return job_of(Origin.of(folder), precision="fp32", global_batch_size=8, num_tokens=64)


def outlook(folder, where, config=None, **options):
    asked = config or TrainingConfig(precision="fp32", global_batch_size=8)
    return outlook_of(asked, Origin.of(folder), where, num_tokens=64, deepspeed=True, **options)


def in_new_processes(size, folder, **arguments):
    """What `training.loops:risen` finds in processes whose heaps are new."""
    script = folder / "script.py"
    script.write_text(
        "import os, pathlib, torch\n"
        "from training import loops\n"
        "torch.set_num_threads(1)\n"
        f"found = loops.risen(**{arguments!r})\n"
        f"pathlib.Path({str(folder)!r}, os.environ['RANK']).write_text(str(found))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--rdzv-backend", "c10d"]
    subprocess.run(
        [sys.executable, *launcher, "--rdzv-endpoint", "localhost:0", str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=True,
    )
    return [int((folder / str(rank)).read_text()) for rank in range(size)]


def test_each_parameter_s_gradient_has_its_moment(job):
    for checkpoints in (False, True):
        moments = job.rehearsed(1, checkpoints, False).moments
        assert {each.name for each in moments} == set(job.sizes)
        assert len(moments) == len(job.sizes)
        assert all(each.highest_bytes >= each.held_bytes >= 0 for each in moments)
        assert moments[-1].name == "model.embed_tokens.weight"  # what forward begins with
    assert job.rehearsed(1, True, False).work.flops > 1.2 * job.rehearsed(1, False, False).work.flops
    highest = [max(each.highest_bytes for each in job.rehearsed(1, on, False).moments) for on in (False, True)]
    assert highest[1] < highest[0]


def test_larger_passes_take_what_they_take_when_they_are_tried(folder, job):
    origin = Origin.of(folder)
    four = job.rehearsed(4, False, False)
    tokens = torch.zeros(4, 64, dtype=torch.int64)
    # Four samples as an example of one, which has the same shape as a pass of four.
    tried = job_of(
        origin, precision="fp32", global_batch_size=8, example={"input_ids": tokens, "labels": tokens}
    ).rehearsed(1, False, False)
    assert [each.name for each in tried.moments] == [each.name for each in four.moments]
    for found, expected in zip(four.moments, tried.moments, strict=True):
        assert found.highest_bytes == pytest.approx(expected.highest_bytes, rel=0.01)
    assert four.work.flops == pytest.approx(tried.work.flops, rel=0.01)


def test_parts_are_parts(job):
    """What is divided over processes is, to the byte, and what is not is whole."""
    total = 4 * job.num_trained
    found = {
        strategy: forecast(job, cluster(4), Way(strategy=strategy)).bytes_by_kind
        for strategy in ("ddp", "fsdp", "zero1", "zero3")
    }
    more = 1.02  # of an allocator
    assert found["ddp"]["parameters"] == pytest.approx(more * total, rel=0.01)
    assert found["ddp"]["optimizer"] >= 2 * total
    assert found["fsdp"]["parameters"] == pytest.approx(more * total / 4, rel=0.01)
    assert found["zero1"]["parameters"] == pytest.approx(more * total * 1.25, rel=0.01)
    assert found["zero3"]["parameters"] == pytest.approx(more * total / 2, rel=0.01)


def test_the_fastest_that_fits_is_taken_and_the_table_says_why(folder):
    roomy = outlook(folder, cluster())
    assert roomy.chosen is not None
    assert roomy.chosen.fits
    fastest = max(each.tokens_per_s for each in roomy.forecasts)
    assert roomy.chosen.tokens_per_s >= fastest / 1.03
    needs = sorted(each.peak_bytes for each in roomy.forecasts)
    limit = needs[0]
    tight = outlook(folder, cluster(limit_bytes=limit))
    assert tight.chosen is not None
    assert tight.chosen.peak_bytes <= limit
    assert tight.chosen.tokens_per_s <= roomy.chosen.tokens_per_s
    assert all(each.tokens_per_s <= 1.03 * tight.chosen.tokens_per_s for each in tight.forecasts if each.fits)
    text = tight.explain()
    assert "does not fit" in text
    assert "is the fastest that fits" in text
    described = json.loads(tight.to_json())
    assert described["chosen"]["peak_bytes"] == tight.chosen.peak_bytes
    assert described["chosen"]["peak_bytes"] == sum(described["chosen"]["bytes_by_kind"].values())
    none = outlook(folder, cluster(limit_bytes=needs[0] - 1))
    assert none.chosen is None
    assert "none fits" in none.explain()
    with pytest.raises(DoesNotFitError, match="needs least") as caught:
        none.take()
    assert caught.value.needed_bytes > caught.value.available_bytes == needs[0] - 1


def test_what_is_stated_is_kept(folder):
    config = TrainingConfig(
        precision="fp32",
        global_batch_size=8,
        strategy="fsdp",
        reshard_after_forward=False,
        micro_batch_size=2,
        activation_checkpointing="off",
    )
    (only,) = outlook(folder, cluster(), config).forecasts
    assert only.way == Way(strategy="fsdp", reshard_after_forward=False, micro_batch_size=2)
    half = outlook(folder, cluster(), TrainingConfig(precision="fp32", global_batch_size=8, reduce_dtype="bf16"))
    assert {each.way.strategy for each in half.forecasts} == {"fsdp"}


def test_accelerators_may_offload_and_nodes_may_hold_copies(folder):
    ways = {each.way.title for each in outlook(folder, accelerators(num_nodes=2)).forecasts}
    assert {"fsdp, all on cpu", "zero3, all on cpu", "zero2, optimizer on cpu", "fsdp, 2 replicas", "ddp"} <= ways
    alone = outlook(folder, accelerators(1))
    assert {each.way.strategy for each in alone.forecasts} == {"single", "fsdp", "zero2", "zero3"}
    away = next(each for each in alone.forecasts if each.way.title == "fsdp, all on cpu")
    near = next(each for each in alone.forecasts if each.way.strategy == "single")
    assert away.peak_bytes < near.peak_bytes
    assert away.host_bytes >= 16 * alone.job.num_trained * 0.9
    assert away.seconds_by_kind["transfers"] > near.seconds_by_kind["transfers"] == 0
    assert away.hidden_s <= away.seconds_by_kind["transfers"]


def test_in_bfloat16_ddp_holds_all_of_the_masters_and_passes_before_the_last_all_gradients(folder):
    config = TrainingConfig(precision="bf16", global_batch_size=64, micro_batch_size=1)
    found = {each.way.title: each for each in outlook(folder, accelerators(8), config).forecasts}
    values = 4 * outlook(folder, accelerators(8), config).job.num_trained
    assert found["ddp"].bytes_by_kind["parameters"] >= values
    assert found["ddp"].bytes_by_kind["optimizer"] >= 2 * values
    assert found["fsdp"].bytes_by_kind["parameters"] == pytest.approx(1.05 * values / 8, rel=0.01)
    assert found["fsdp"].bytes_by_kind["gradients"] >= values  # eight passes
    assert found["zero1"].bytes_by_kind["gradients"] >= values  # DeepSpeed's sums of the whole


def test_recomputed_units_fill_no_cache(folder):
    inputs = {name: torch.ones(1, 12, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}
    job = job_of(Origin.of(folder), precision="fp32", global_batch_size=8, example=inputs)
    plain, again = (job.rehearsed(1, on, False) for on in (False, True))
    assert max(m.highest_bytes for m in again.moments) < max(m.highest_bytes for m in plain.moments)


def test_experts_can_be_tried(tmp_path):
    from families import make_checkpoint

    origin = Origin.of(make_checkpoint("mixtral", tmp_path))
    job = job_of(origin, precision="fp32", global_batch_size=2, num_tokens=32)
    assert {each.name for each in job.rehearsed(1, False, False).moments} == set(job.sizes)


def test_no_way_and_no_sample_leave_what_was_before(folder):
    def pairs(samples):
        assert len(samples) > 1
        return torch.utils.data.default_collate(samples)

    run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8))
    run.prepare(model=folder, optimizer=torch.optim.AdamW, data=Sentences(), collate_fn=pairs)
    assert run.config.micro_batch_size in (1, 2, 3, 4, 8)  # of samples that are made up
    scalar = Origin.of(folder)
    scalar.module.register_parameter("scale", torch.nn.Parameter(torch.empty((), device="meta")))
    with pytest.raises(NotTriedError, match="none takes this model"):
        outlook_of(TrainingConfig(precision="fp32"), scalar, cluster(), num_tokens=64, deepspeed=False)


def test_nodes_of_copies_send_over_the_network():
    where = accelerators(8, num_nodes=4, network_bytes_per_s=1e11)
    assert where.all_reduce_s(1e9, 4, beside=8) == pytest.approx(2 * 1e9 * 3 / 4 / (1e11 / 8))
    assert where.all_reduce_s(1e9, 4) < where.all_reduce_s(1e9, 4, beside=8)


def test_a_model_whose_backward_leaves_something_out_is_not_given_to_ddp(tmp_path):
    save_llama(tmp_path)
    origin = Origin.of(tmp_path)
    origin.module.register_parameter("unused", torch.nn.Parameter(torch.empty(8, 8, device="meta")))
    found = outlook_of(TrainingConfig(precision="fp32"), origin, cluster(), num_tokens=64, deepspeed=False)
    assert {each.way.strategy for each in found.forecasts} == {"fsdp"}


def test_unequal_devices_are_as_large_as_the_smallest():
    machine = bigmodel.Machine.load("desktop-2x24gb")
    first, second = machine.accelerators
    found = Cluster.of(replace(machine, accelerators=(first, replace(second, memory_bytes=second.memory_bytes - GIB))))
    assert found.wasted_bytes == GIB
    assert found.limit_bytes == int(0.95 * (second.memory_bytes - GIB))
    assert found.num_processes == 2


def test_a_run_says_what_it_takes(folder):
    run = TrainingRun(TrainingConfig(strategy="single", precision="fp32", global_batch_size=8))
    run.prepare(model=folder, optimizer=torch.optim.AdamW, data=Sentences())
    text = run.explain()
    assert text.startswith("one process, float32\n")
    assert "single is the fastest that fits" in text
    assert run.config.micro_batch_size in (1, 2, 3, 4, 8)
    assert run.config.activation_checkpointing in ("on", "off")


def test_two_processes_choose_the_same_and_go_on_with_it(two, folder, tmp_path):
    found = two.run("training.loops:chosen", path=str(folder), folder=str(tmp_path))
    assert found[0] == found[1]
    first, again, otherwise = found[0]
    assert first["strategy"] in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    assert first["micro_batch_size"] in (1, 2, 4)
    assert again == first
    assert otherwise["strategy"] == "zero1"  # what the checkpoint's run had chosen
    assert otherwise["micro_batch_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("size", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp"), (2, "zero2")])
def test_memory_is_what_was_predicted(folder, tmp_path, size, strategy):
    """Of a model whose tensors are larger than what libraries hold beside them, such as buffers for products."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16000}
    save_llama(tmp_path, num_attention_heads=8, num_key_value_heads=8, **sizes)
    asked = {"strategy": strategy, "micro_batch_size": 2, "activation_checkpointing": "off"}
    found = in_new_processes(size, tmp_path, path=str(tmp_path), tiny=str(folder), **asked)
    config = TrainingConfig(precision="fp32", **asked)
    (only,) = outlook_of(config, Origin.of(tmp_path), cluster(size), num_tokens=256).forecasts
    measured = max(found)
    assert 0.8 * only.peak_bytes <= measured <= 1.15 * only.peak_bytes, (measured, only.bytes_by_kind)


@pytest.mark.parametrize("options", [(), ("--lora", "8"), ("--nodes", "4", "--gpus", "8", "--strategy", "fsdp")])
def test_plans_of_training_from_the_command_line(folder, options):
    asked = ["plan", str(folder), "--train", "--machine", "server-8x80gb", "--seq", "64", *options]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    assert "is the fastest that fits" in done.stdout
    told = CliRunner().invoke(app, [*asked, "--json"])
    found = json.loads(told.stdout)
    assert found["num_per_node"] == 8
    assert found["num_nodes"] == (4 if options[:1] == ("--nodes",) else 1)
    assert found["chosen"]["fits"]
    assert (found["frozen_bytes"] > 0) == (options[:1] == ("--lora",))


def test_limits_of_plans_of_training_are_used_whole(folder):
    asked = ["plan", str(folder), "--train", "--machine", "server-8x80gb", "--seq", "64", "--json", "--max-memory"]
    found = json.loads(CliRunner().invoke(app, [*asked, "0=16GiB,cuda:1=17GiB"]).stdout)
    assert found["num_per_node"] == 2
    assert {each["limit_bytes"] for each in found["ways"]} == {16 * GIB}
    host = json.loads(CliRunner().invoke(app, [*asked, "cpu=8GiB", "--gpus", "2"]).stdout)
    assert {each["limit_bytes"] for each in host["ways"]} == {4 * GIB}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--train", "--html", "page.html", "--device-map", "disk"),
            "--device-map and --html are for a model that runs",
        ),
        (("--lora", "8"), "--lora is for a plan of training. Give --train"),
    ],
)
def test_options_of_the_other_plan_are_refused(folder, options, told):
    done = CliRunner().invoke(app, ["plan", str(folder), *options])
    assert done.exit_code == 2
    assert told in done.stderr


def test_a_disk_is_weighed_where_there_is_one(folder):
    near = accelerators(2, host_limit_bytes=8 * GIB)
    there = replace(near, disk_limit_bytes=64 * GIB, disk_read_bytes_per_s=2e9)
    ways = {each.way.title: each for each in outlook(folder, there).forecasts}
    on_disk = ways["zero3, all on nvme"]
    assert {each.way.title for each in outlook(folder, near).forecasts} == {
        title for title, each in ways.items() if not each.way.is_on_disk
    }
    values = outlook(folder, there).job.num_trained
    assert on_disk.disk_bytes == pytest.approx((16 + 4) * values / 2, rel=0.01)
    assert on_disk.seconds_by_kind["disk"] >= 16 * values / 2 / 2e9
    assert on_disk.step_s >= on_disk.seconds_by_kind["disk"]
    assert on_disk.peak_bytes < ways["zero3"].peak_bytes
    slow = outlook(folder, replace(there, disk_write_bytes_per_s=1e6))
    assert {each.way.title: each for each in slow.forecasts}["zero3, all on nvme"].step_s > 10 * on_disk.step_s
    full = outlook(folder, replace(there, disk_limit_bytes=on_disk.disk_bytes - 1))
    assert not {each.way.title: each for each in full.forecasts}["zero3, all on nvme"].fits


def test_offloading_says_what_it_costs(folder):
    config = TrainingConfig(
        precision="fp32", global_batch_size=8, strategy="zero3", offload_optimizer="cpu", offload_params="cpu"
    )
    found = outlook(folder, accelerators(2), config)
    stated = TrainingConfig(precision="fp32", global_batch_size=8, strategy="zero3")
    plain = outlook(folder, accelerators(2), stated)
    micro = found.forecasts[0].way.micro_batch_size
    assert found.slowdown == found.forecasts[0].step_s / found.near.step_s > 1
    assert found.near in [each for each in plain.forecasts if each.way.micro_batch_size == micro]
    assert f"take {found.slowdown:.2g} times as long" in found.explain()
    assert json.loads(found.to_json())["offloading_slows_by"] == found.slowdown
    assert plain.slowdown is None
    assert "times as long" not in plain.explain()
