"""A run that is killed at any moment goes on from its last complete checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bigmodel.training.checkpoint import complete_ones
from training.loops import save_llama, train

TESTS = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys
from training.loops import Sentences
from bigmodel.training import TrainingConfig, TrainingRun
import torch
torch.set_num_threads(1)
run = TrainingRun(TrainingConfig(precision="fp32", global_batch_size=8, micro_batch_size=4, grad_clip=1.0))
model, _, loader, _ = run.prepare(
    model=sys.argv[1], optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), data=Sentences(),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10), progress=False)
print("from", run.load_last(sys.argv[2]), flush=True)
step = 0
while step < 400:
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if loader.is_last:
            step = run.last_step.step
            run.save(f"{sys.argv[2]}/{'even' if step % 2 else 'odd'}", keep=2)
            print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path):
    save_llama(tmp_path / "llama")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "llama"), str(checkpoints)]
    draws, last = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        lines = []
        while not any(line.startswith("saved") for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        time.sleep(draws.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        told = max(int(line.split()[1]) for line in lines if line.startswith("saved") and line.endswith("\n"))
        found = complete_ones(checkpoints)
        assert found[0][1]["step"] in (told, told + 1)  # killed after it was put in place, before it was told
        assert found[0][1]["step"] > last
        last = found[0][1]["step"]
    steps = last
    path, manifest = found[0]
    rest = train(
        tmp_path / "llama",
        2,
        strategy="single",
        precision="fp32",
        micro_batch_size=4,
        checkpoint=str(path),
        resumes=True,
    )
    whole = train(tmp_path / "llama", steps + 2, strategy="single", precision="fp32", micro_batch_size=4)
    assert manifest["step"] == steps
    assert rest["losses"] == whole["losses"][steps:]
    assert all(torch.equal(rest["parameters"][name], each) for name, each in whole["parameters"].items())
