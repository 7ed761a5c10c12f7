"""A process that fails ends the job; nobody waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent

SCRIPT = """
import torch
from bigmodel.training import TrainingConfig, TrainingRun

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        if run.processes.rank == 1 and number > 3:
            raise ValueError("a torn file")
        return torch.ones(2)

run = TrainingRun(TrainingConfig(strategy="ddp", precision="fp32", global_batch_size=2))
model, _, loader = run.prepare(
    model=torch.nn.Linear(2, 1), optimizer=lambda params: torch.optim.SGD(params, lr=0.1), data=Samples())
for batch in loader:
    with run.accumulate():
        run.backward(model(batch).mean())
        run.step()
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them_and_is_shown(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = dict(os.environ) | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    started_s = time.monotonic()
    done = subprocess.run(
        [*launcher, "--rdzv-endpoint", "localhost:0", str(tmp_path / "script.py")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "a torn file" in done.stderr
    assert time.monotonic() - started_s < 100  # not the half hour of a collective


LONELY = """
import sys
from datetime import timedelta
import torch
from bigmodel.training import TrainingConfig, TrainingRun, checkpoint

class Flow(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from torch.ones(8, 2)

checkpoint.CALL_TIMEOUT = timedelta(seconds=4)
run = TrainingRun(TrainingConfig(strategy="ddp", precision="fp32", global_batch_size=2))
_, _, loader = run.prepare(
    model=torch.nn.Linear(2, 1),
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    data=Flow(),
    shard=lambda data, rank, size: data,  # what each has read is told to all in a save
)
next(iter(loader))
if run.is_main_process:
    run.save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_save_that_one_process_calls_alone_ends_with_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "script.py").write_text(LONELY)
    environment = dict(os.environ) | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [*launcher, "--rdzv-endpoint", "localhost:0", str(tmp_path / "script.py"), str(tmp_path / "saved")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "TrainingError: Not every process called run.save within 0:00:04" in done.stderr
    assert "not under is_main_process" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
