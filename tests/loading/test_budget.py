"""The stated peak holds, measured on the real model: loading and running, in a control group that would end the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each loads the real model in a process of its own

GROUPS = Path("/sys/fs/cgroup/memory")
CHILD = """
import json, sys
from pathlib import Path
group, path, limit, prompt, new, dtype = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
if group:
    Path(group, "cgroup.procs").write_text("0")
import torch, transformers, bigmodel, bigmodel.loading
import torch._subclasses.fake_tensor
getattr(transformers, json.loads(Path(path, "config.json").read_text())["architectures"][0])
from bigmodel.footprint import PeakFootprint, footprint_bytes

workload = bigmodel.Workload(prompt_tokens=prompt, new_tokens=new)
options = {"max_memory": {"cpu": limit}, "workload": workload, "dtype": dtype, "offload_folder": path + "-converted"}
plan = bigmodel.make_plan(path, **options)
baseline = footprint_bytes()
peak = plan.estimate.peak_bytes["cpu"]
if group:
    Path(group, "memory.limit_in_bytes").write_text(str(baseline + peak + (64 << 20)))
ids = (torch.arange(prompt) % 80 + 5).view(1, prompt)
with PeakFootprint() as measured:
    model = bigmodel.load_sharded(path, progress=False, **options)
    tokens = model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
stats = bigmodel.stats_of(model)
print(json.dumps({
    "planned": peak, "measured": measured.peak_bytes - baseline, "limit": plan.limits["cpu"],
    "tokens": tokens.tolist(), "read": stats.read_bytes, "resident": plan.resident_bytes,
}))
"""

TRAINED = """
import json, sys
from pathlib import Path
path, limit, prompt = sys.argv[1], sys.argv[2], int(sys.argv[3])
import peft, torch, transformers, bigmodel, bigmodel.loading
import torch._subclasses.fake_tensor, torch.utils.checkpoint
getattr(transformers, json.loads(Path(path, "config.json").read_text())["architectures"][0])
from bigmodel.footprint import PeakFootprint, footprint_bytes

workload = bigmodel.Workload(prompt_tokens=prompt, new_tokens=1, trains=True)
options = {"max_memory": {"cpu": limit}, "workload": workload}
plan = bigmodel.make_plan(path, **options)
baseline = footprint_bytes()
ids = (torch.arange(prompt) % 80 + 5).view(1, prompt)
with PeakFootprint() as measured:
    model = bigmodel.load_sharded(path, progress=False, **options)
    config = peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    around = peft.get_peft_model(model, config).train()
    for _ in range(2):
        loss = around(input_ids=ids, labels=ids).loss
        loss.backward()
refused = ""
try:
    around(input_ids=ids.repeat(4, 2), labels=ids.repeat(4, 2))
except bigmodel.errors.DoesNotFitError as error:
    refused = str(error)
print(json.dumps({
    "planned": plan.estimate.peak_bytes["cpu"], "measured": measured.peak_bytes - baseline, "limit": plan.limits["cpu"],
    "read": bigmodel.stats_of(model).read_bytes, "refused": refused,
}))
"""


def run(path, limit, prompt=64, new=16, group="", dtype="auto"):
    return said(CHILD, str(group), str(path), limit, str(prompt), str(new), dtype)


def said(*command):
    """What a process of its own printed last."""
    done = subprocess.run(
        [sys.executable, "-c", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("limit", "prompt"), [("200MiB", 64), pytest.param("260MiB", 64, marks=pytest.mark.long), ("300MiB", 400)]
)
def test_a_streamed_run_stays_within_the_stated_peak(smollm2, limit, prompt):
    result = run(smollm2, limit, prompt)
    assert result["read"] > 0
    assert result["measured"] <= result["planned"] <= result["limit"]


def test_a_run_that_casts_every_weight_stays_within_it(smollm2):
    result = run(smollm2, "360MiB", dtype="float32")
    assert result["read"] > 0
    assert result["measured"] <= result["planned"] <= result["limit"]


@pytest.fixture
def experts(tmp_path):
    """80 MB of experts that are stored transposed, and must be converted before they can stream."""
    from families import large_experts

    return large_experts(tmp_path / "experts")


@pytest.mark.parametrize("limit", ["150MiB", "1GiB"])
def test_a_run_that_converts_weights_stays_within_it(experts, limit):
    result = run(experts, limit)
    assert result["measured"] <= result["planned"] <= result["limit"]


@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0 or not (GROUPS / "memory.limit_in_bytes").exists(),
    reason="makes a memory control group (version 1)",
)
def test_it_survives_in_a_control_group_of_baseline_and_peak_and_a_little(smollm2):
    group = GROUPS / f"bigmodel-test-{os.getpid()}"
    group.mkdir()
    try:
        confined = run(smollm2, "200MiB", group=group)
    finally:
        group.rmdir()
    free = run(smollm2, "1GiB")
    assert free["read"] == 0
    assert confined["read"] > 0
    assert confined["tokens"] == free["tokens"]


def test_adapters_are_trained_within_the_stated_peak(smollm2):
    result = said(TRAINED, str(smollm2), "300MiB", "64")
    assert result["read"] > 0
    assert result["planned"] // 2 <= result["measured"] <= result["planned"] <= result["limit"]
    assert "A pass of 4 x 128 tokens that is recorded needs" in result["refused"]
    assert "Workload(batch_size=4, prompt_tokens=128, trains=True)" in result["refused"]
