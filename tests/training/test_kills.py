"""A run that is killed at any moment goes on from its last complete checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from bigmodel.training.folders import complete_ones
from training.loops import save_llama, train

TESTS = Path(__file__).resolve().parent.parent
NUM_KILLS = int(os.environ.get("BIGMODEL_TEST_KILLS", "1"))

SCRIPT = """
import sys
from training.loops import Sentences
from bigmodel.training import TrainingConfig, TrainingRun
import torch
torch.set_num_threads(1)
run = TrainingRun(
    TrainingConfig(strategy=sys.argv[3], precision="fp32", global_batch_size=8, micro_batch_size=4, grad_clip=1.0))
model, _, loader, _ = run.prepare(
    model=sys.argv[1], optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), data=Sentences(),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10), progress=False)
run.load_last(sys.argv[2])
step = 0
while step < 400:
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if loader.is_last:
            step = run.last_step.step
            run.save(f"{sys.argv[2]}/{'even' if step % 2 else 'odd'}", keep=2)
            if run.is_main_process:
                print("saved", step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "size"), [("single", 1), ("fsdp", 2), pytest.param("zero3", 2, marks=pytest.mark.long)]
)
def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path, strategy, size):
    save_llama(tmp_path / "llama")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0"]
    script = [str(tmp_path / "script.py"), str(tmp_path / "llama"), str(checkpoints), strategy]
    command = [sys.executable, *(launcher if size > 1 else []), *script]
    draws, last = random.Random(0), 0
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        lines = []
        while not any(line.startswith("saved") for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        time.sleep(draws.uniform(0.0, 0.4))
        of_all = [*psutil.Process(process.pid).children(recursive=True), process]
        for each in of_all:  # workers first: the launcher would end them gently
            each.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        told = max(int(line.split()[1]) for line in lines if line.startswith("saved") and line.endswith("\n"))
        found = complete_ones(checkpoints)
        assert found[0][1]["step"] in (told, told + 1)  # killed after it was put in place, before it was told
        assert found[0][1]["step"] > last
        last = found[0][1]["step"]
    path, manifest = found[0]
    asked = {"precision": "fp32", "micro_batch_size": 4}
    rest = train(tmp_path / "llama", 2, strategy="single", checkpoint=str(path), resumes=True, **asked)
    whole = train(tmp_path / "llama", last + 2, strategy="single", **asked)
    assert manifest["step"] == last
    if size == 1:
        assert rest["losses"] == whole["losses"][last:]
        assert all(torch.equal(rest["parameters"][name], each) for name, each in whole["parameters"].items())
    assert max(abs(a - b) for a, b in zip(rest["losses"], whole["losses"][last:], strict=True)) <= 1e-4
