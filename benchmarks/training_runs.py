"""What `benchmarks.training` runs in the processes of torch's launcher: each writes what it saw as ``RANK.json``."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

import bigmodel.models
from bigmodel.footprint import PeakFootprint, footprint_bytes
from bigmodel.training import TrainingConfig, TrainingRun

__all__ = ["load", "overhead", "speed"]

NUM_TOKENS = 256


class _Tokens(Dataset[Any]):
    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(self._vocabulary, (NUM_TOKENS,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}


def _warm(tiny: str, **options: Any) -> None:
    """What a run imports and what its process group takes is there before the clock starts."""
    _steps(tiny, 2, **options)


def _steps(path: str, count: int, **options: Any) -> tuple[TrainingRun, list[float]]:
    run = TrainingRun(TrainingConfig(global_batch_size=4, micro_batch_size=2, **options))
    config = json.loads((Path(path) / "config.json").read_text())
    model, _, loader = run.prepare(
        model=path,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5),
        data=_Tokens(config["vocab_size"]),
        progress=False,
    )
    times: list[float] = []
    started_s = time.perf_counter()
    for batch in loader:
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if loader.is_last:
            times.append(time.perf_counter() - started_s)
            started_s = time.perf_counter()
            if len(times) == count:
                break
    return run, times


def load(path: str, tiny: str, **options: Any) -> dict[str, Any]:
    """Peak anonymous memory while weights are put in place.

    Returns:
        ``rise_bytes``, ``own_bytes`` of this process's parameters, ``unit_bytes`` of the largest unit in float32.
    """
    bigmodel.models.import_libraries()
    _warm(tiny, **options)
    run = TrainingRun(TrainingConfig(**options))
    before = footprint_bytes()
    with PeakFootprint() as memory:
        module = run.prepare(model=path, progress=False)
    parameters = [each.data for each in module.parameters()]
    local = [each._local_tensor if isinstance(each, DTensor) else each for each in parameters]
    layers = max((each for each in module.modules() if isinstance(each, nn.ModuleList)), key=len)
    units = [*layers, *(each for each in module.modules() if isinstance(each, (nn.Embedding, nn.Linear)))]
    return {
        "rise_bytes": memory.peak_bytes - before,
        "own_bytes": sum(each.numel() * 4 for each in local),
        "unit_bytes": max(sum(each.numel() * 4 for each in unit.parameters()) for unit in units),
    }


def speed(path: str, tiny: str, **options: Any) -> dict[str, Any]:
    """Optimizer steps of 4 samples of 256 tokens.

    Returns:
        ``tokens_per_s`` of all processes, ``rise_bytes`` at the peak of load and steps.
    """
    _warm(tiny, **options)
    before = footprint_bytes()
    with PeakFootprint() as memory:
        _, times = _steps(path, 4, **options)
    return {
        "tokens_per_s": 4 * NUM_TOKENS / statistics.median(times[1:]),
        "rise_bytes": memory.peak_bytes - before,
    }


def overhead(**options: Any) -> dict[str, Any]:
    """Our own time for each micro-batch: a loop around a model that does nothing, less the same loop by hand.

    Returns:
        ``seconds`` of a micro-batch.
    """

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, number: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * number).sum()}

    class Numbers(Dataset[Any]):
        def __len__(self) -> int:
            return 8000

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            return {"number": torch.ones(()), "labels": torch.ones(2)}

    run = TrainingRun(TrainingConfig(global_batch_size=4, micro_batch_size=1, precision="fp32", **options))
    model, _, loader = run.prepare(
        model=Nothing(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0), data=Numbers()
    )
    plain_model = Nothing()
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.0)
    ours, by_hand = [], []
    iterator = iter(loader)
    for _ in range(20):
        started_s = time.perf_counter()
        for _ in range(200):
            batch = next(iterator)
            with run.accumulate():
                run.backward(run.loss(model(**batch), batch))
                run.step()
        ours.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        plain = torch.utils.data.DataLoader(Numbers(), batch_size=1)
        for number, batch in enumerate(plain, start=1):
            (plain_model(**batch)["loss"] / 4).backward()
            if number % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            if number == 200:
                break
        by_hand.append(time.perf_counter() - started_s)
    return {"seconds": (statistics.median(ours) - statistics.median(by_hand)) / 200}


def _main() -> None:
    name, arguments, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    found = globals()[name](**arguments)
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main()
