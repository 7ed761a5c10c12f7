"""Memory that runs out in a pass: the error that was raised says what to try next."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bigmodel.training import TrainingConfig, TrainingRun
from bigmodel.training.shortage import smaller
from training.loops import Sentences

SCRIPT = """
import resource, sys, torch
from bigmodel.training import TrainingConfig, TrainingRun

class Hungry(torch.nn.Module):  # of each sample a GiB, in forward or in backward
    def __init__(self, where):
        super().__init__()
        self.weight, self.where = torch.nn.Parameter(torch.ones(1)), where
    def forward(self, number, labels):
        taken = torch.ones(len(number) << 28) if self.where == "forward" else torch.ones(1)
        loss = Eats.apply(self.weight.sum(), len(number) << 28) if self.where == "backward" else self.weight.sum()
        return {"loss": loss * taken[0]}

class Eats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, size):
        ctx.size = size
        return value.clone()
    @staticmethod
    def backward(ctx, given):
        return given * torch.ones(ctx.size)[0], None

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, number):
        return {"number": torch.tensor(number), "labels": torch.ones(2, dtype=torch.int64)}

run = TrainingRun(TrainingConfig(strategy="single", precision="fp32", global_batch_size=12, micro_batch_size=int(sys.argv[2])))
run.prepare(model=Hungry(sys.argv[1]), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), data=Numbers(), progress=False)
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30),) * 2)
run.train_step()
print("went well")
"""


def after(where, micro_batch_size):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, where, str(micro_batch_size)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_ran_out_of_memory_says_what_fits_next(where):
    found = after(where, 6)
    assert found.returncode == 1
    assert "can't allocate memory" in found.stderr  # the error itself
    told = "memory ran out in a pass of 6 samples. The next to try is micro_batch_size=4 (of a DataLoader: its batch_size), "
    assert found.stderr.count(told + "with global_batch_size=12, which trains to the same.") == 1
    assert after(where, 2).stdout == "went well\n"


def test_one_sample_that_does_not_fit_has_other_ways(folder, monkeypatch):
    run = TrainingRun(TrainingConfig(strategy="fsdp", precision="fp32"))
    model, _, loader = run.prepare(
        model=str(folder), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Sentences(), progress=False
    )
    batch = next(iter(loader))

    def fails(*args):
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError, match="no more") as caught:
            model(**batch)
    (note,) = caught.value.__notes__
    assert "in a pass of 1 sample. It cannot be smaller" in note
    assert note.endswith('what is left to try: activation_checkpointing="on", shorter samples.')
    model.eval()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError, match="no more") as caught:
            model(**batch)
    assert "in a pass that is not trained on" in caught.value.__notes__[0]
    run = TrainingRun(TrainingConfig(strategy="single", precision="fp32"))
    model, _, loader = run.prepare(
        model=str(folder), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Sentences(), progress=False
    )
    with pytest.raises(RuntimeError, match="Expected tensor for argument") as other:  # any other error stays as it is
        model(input_ids=torch.ones(1, 3))
    assert not hasattr(other.value, "__notes__")


@pytest.mark.parametrize(
    ("micro", "each", "next_one"), [(6, 12, 4), (12, 12, 6), (5, 12, 3), (2, 12, 1), (1, 12, 0), (8, 4, 2)]
)
def test_the_next_size_needs_one_pass_more(micro, each, next_one):
    assert smaller(micro, each) == next_one
