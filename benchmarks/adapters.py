"""Adapters on a base that is larger than memory: their gradients, time and memory beside the resident model's.

``python -m benchmarks.adapters``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Figure, Report, median, quickest
from benchmarks.settings import BLOCK_BYTES, READER_COUNTS, Settings, parse_settings
from bigmodel.bench.harness import Bench, Outcome, Trial

__all__ = ["run_merge", "run_steps"]

PARTS = ("steps", "merge")
MIB = 1 << 20
NUM_TOKENS, RANK = 512, 8
STREAMED, RESIDENT = "bigmodel, all on disk, half of the checkpoint's memory", "resident, the same checkpointing"
MERGE = "merged export"
# Of the control group, for the interpreter, its libraries and the kernel's own pages; the rest is the host budget.
OUTSIDE_BUDGET_BYTES = 512 * MIB
_LEAST_BYTES = 1024 * MIB  # of the control group, where half of a checkpoint does not hold an interpreter


def main() -> None:
    settings = parse_settings(__doc__ or "", PARTS)
    limit_bytes = max(settings.num_bytes // 2, _LEAST_BYTES)
    configuration = settings.configuration | {
        "adapter": f"LoRA, rank {RANK}, on all linear layers of the blocks, float32; batch 1 x {NUM_TOKENS} tokens",
        "cgroup": f"{limit_bytes // MIB} MiB for what streams, interpreter, libraries and page cache included",
    }
    report = Report("-".join(["adapters", settings.shape, *sorted(settings.only)]), configuration)
    with Bench(balloon_bytes=settings.num_bytes * 12 // 10) as bench:
        if settings.runs("steps"):
            _steps(bench, report, settings, limit_bytes)
        if settings.runs("merge"):
            _merge(bench, report, settings, limit_bytes)
        print(report.markdown(bench))
        if settings.results is not None:
            print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)


def _steps(bench: Bench, report: Report, settings: Settings, limit_bytes: int) -> None:
    raw = [
        Trial(
            name=f"raw O_DIRECT into a ring, {count} threads",
            call="bigmodel.bench.raw_read:read_into_ring",
            arguments={
                "ranges": [(str(file), 0, file.stat().st_size // 4096 * 4096) for file in settings.files],
                "num_threads": count,
                "block_bytes": BLOCK_BYTES,
                "ring_bytes": 256 * MIB,
                "num_passes": 2,
            },
            files=settings.files,
        )
        for count in READER_COUNTS
    ]
    paths = {"path": str(settings.path), "tiny": str(settings.tiny)}
    common = {"call": "benchmarks.adapters:run_steps", "files": settings.files}
    trials = [
        Trial(
            name=STREAMED,
            arguments=paths | {"budget_bytes": limit_bytes - OUTSIDE_BUDGET_BYTES},
            limit_bytes=limit_bytes,
            is_cold=True,
            **common,
        ),
        Trial(
            name=RESIDENT,
            arguments=paths,
            **common,
        ),
    ]
    outcomes = bench.interleaved([*raw, *trials], settings.num_rounds)
    report.keep(outcomes)
    pairs = [
        (mine.result, other.result)
        for mine, other in zip(outcomes[STREAMED], outcomes[RESIDENT], strict=False)
        if mine.error is None and other.error is None
    ]
    best = quickest(outcomes, [trial.name for trial in raw])
    reads = [] if best is None else [2 * median(_as_list(each.result["seconds"])) for each in _good(outcomes[best])]
    unequal = [
        float(sum(mine["digests"][name] != each for name, each in other["digests"].items())) for mine, other in pairs
    ]
    report.add(
        Figure(name="adapter gradients that differ from the resident run's", values=unequal, limit=0, is_promise=True)
    )
    report.add(
        Figure(
            name="losses that differ",
            values=[float(mine["losses"] != other["losses"]) for mine, other in pairs],
            limit=0,
            is_promise=True,
        )
    )
    report.add(
        Figure(
            name="step over the longer of two reads of all weights and the resident step",
            values=[
                mine["seconds"] / max(twice, other["seconds"])
                for (mine, other), twice in zip(pairs, reads, strict=False)
            ],
            limit=1.3,
            unit="x",
            note=f"two reads {median(reads):.2f} s, resident step {median([other['seconds'] for _, other in pairs]):.1f} s",
        )
    )
    report.add(
        Figure(
            name="bytes read in a step over the checkpoint's",
            values=[mine["read_bytes"] / settings.num_bytes for mine, _ in pairs],
            limit=2.0,
            unit="x",
        )
    )
    report.add(
        Figure(
            name="step over the predicted one",
            values=[mine["seconds"] / mine["planned_s"] for mine, _ in pairs],
            unit="x",
            note="the optimizer's step is in the measured one alone; the rates are those of `bigmodel calibrate`, or defaults",
        )
    )
    report.add(
        Figure(
            name="peak over the planned one, of what streams",
            values=[mine["peak_bytes"] / mine["planned_bytes"] for mine, _ in pairs],
            limit=1.0,
            is_promise=True,
            unit="x",
            note=(
                f"planned {median([mine['planned_bytes'] / MIB for mine, _ in pairs]):.0f} MiB; the resident run "
                f"{median([other['peak_bytes'] / MIB for _, other in pairs]):.0f} MiB"
            ),
        )
    )


def _merge(bench: Bench, report: Report, settings: Settings, limit_bytes: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix=".merged-", dir=settings.scratch))
    try:
        trial = Trial(
            name=MERGE,
            call="benchmarks.adapters:run_merge",
            arguments={"path": str(settings.path), "tiny": str(settings.tiny), "folder": str(folder)}
            | {"budget_bytes": limit_bytes - OUTSIDE_BUDGET_BYTES},
            files=settings.files,
            limit_bytes=limit_bytes,
            is_cold=True,
        )
        outcomes = bench.interleaved([trial], settings.num_rounds)
    finally:
        shutil.rmtree(folder)
    report.keep(outcomes)
    found = [each.result for each in _good(outcomes[MERGE])]
    report.add(
        Figure(
            name="memory of a merged export over one unit + 150 MiB",
            values=[each["export_bytes"] / (each["unit_bytes"] + 150 * MIB) for each in found],
            limit=1.0,
            is_promise=True,
            unit="x",
            note=f"one unit {found[0]['unit_bytes'] / MIB:.0f} MiB" if found else "",
        )
    )
    report.add(
        Figure(
            name="merged tensors that differ from those merged in memory",
            values=[float(each["num_unequal"]) for each in found],
            limit=0,
            is_promise=True,
        )
    )


def _good(outcomes: list[Outcome]) -> list[Outcome]:
    return [each for each in outcomes if each.error is None]


def _as_list(value: Any) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# --- What runs in processes of their own


def run_steps(path: str, tiny: str, *, budget_bytes: int = 0, num_steps: int = 2) -> dict[str, Any]:
    """Steps of adapters after one that is not timed: seconds, losses, digests of the first gradients, bytes."""
    import bigmodel
    from bigmodel.footprint import PeakFootprint, footprint_bytes

    for _ in _stepped(tiny, budget_bytes=budget_bytes, num_steps=1, num_tokens=16):  # what is imported is there before
        pass
    before = footprint_bytes()
    losses, seconds, digests, read_bytes, planned_bytes, planned_s = [], [], {}, [], 0, None
    with PeakFootprint() as memory:
        for run, loss, gradients, second, earlier in _stepped(
            path, budget_bytes=budget_bytes, num_steps=1 + num_steps, num_tokens=NUM_TOKENS
        ):
            losses.append(loss)
            if budget_bytes:
                estimate = bigmodel.plan_of(run.unwrap()).estimate
                planned_bytes, planned_s = estimate.peak_bytes["cpu"], estimate.train_step_s
            seconds.append(second)
            digests = digests or gradients
            if budget_bytes:
                read_bytes.append((bigmodel.stats_of(run.unwrap()) - earlier).read_bytes)
    return {
        "losses": losses,
        "seconds": median(seconds[1:]),
        "digests": digests,
        "read_bytes": median(read_bytes[1:]) if budget_bytes else 0,
        "peak_bytes": memory.peak_bytes - before,
        "planned_bytes": planned_bytes,
        "planned_s": planned_s,
    }


def _stepped(path: str, *, budget_bytes: int, num_steps: int, num_tokens: int) -> Any:
    """Steps with all on disk within a budget, or in memory where it is 0.

    Yields:
        The run, its loss, digests of its gradients, its seconds, and the statistics before it.
    """
    import torch

    import bigmodel
    from bigmodel.training import TrainingConfig, TrainingRun

    torch.set_num_threads(2)
    run = TrainingRun(TrainingConfig(precision="fp32", activation_checkpointing="on"))
    model, _, loader = _prepared(run, path, budget_bytes=budget_bytes, num_tokens=num_tokens)
    started_s, earlier = time.perf_counter(), bigmodel.stats_of(model) if budget_bytes else None
    for number, batch in enumerate(loader):
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            digests = {}
            if not number:
                digests = {
                    name: hashlib.sha256(each.grad.numpy().tobytes()).hexdigest()
                    for name, each in model.named_parameters()
                    if each.requires_grad
                }
            run.step()
        assert run.last_step is not None
        yield run, run.last_step.loss, digests, time.perf_counter() - started_s, earlier
        if number + 1 == num_steps:
            return
        started_s, earlier = time.perf_counter(), bigmodel.stats_of(model) if budget_bytes else None


def _prepared(run: Any, path: str, *, budget_bytes: int, num_tokens: int) -> Any:
    import json

    import torch
    from peft import LoraConfig

    import bigmodel

    workload = bigmodel.Workload(prompt_tokens=num_tokens, new_tokens=1, trains=True)
    where: Any = {"device_map": "cpu"}
    if budget_bytes:
        where = {"device_map": {"": "disk"}, "max_memory": {"cpu": budget_bytes}}
    model = bigmodel.load_sharded(path, workload=workload, progress=False, **where)
    vocabulary = json.loads((Path(path) / "config.json").read_text())["vocab_size"]

    def sample(number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}

    return run.prepare(
        model=model,
        adapter=LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        data=[sample(number) for number in range(8)],
        progress=False,
    )


def run_merge(path: str, tiny: str, folder: str, budget_bytes: int) -> dict[str, Any]:
    """What a merged export of adapters on a base that streams holds, and whether it is what PEFT merges in memory."""
    import torch
    from safetensors import safe_open

    import bigmodel
    from bigmodel.footprint import PeakFootprint, footprint_bytes
    from bigmodel.training import TrainingConfig, TrainingRun

    def exported(path: str, folder: Path, num_tokens: int) -> tuple[Any, int]:
        run = TrainingRun(TrainingConfig(precision="fp32"))
        model, *_ = _prepared(run, path, budget_bytes=budget_bytes, num_tokens=num_tokens)
        with torch.no_grad():
            for name, each in model.named_parameters():
                if each.requires_grad and "lora_B" in name:
                    each.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
        before = footprint_bytes()
        with PeakFootprint() as memory:
            run.export(folder, merge=True)
        return model, memory.peak_bytes - before

    exported(tiny, Path(folder) / "tiny", 16)
    model, export_bytes = exported(path, Path(folder) / "merged", NUM_TOKENS)
    plan = bigmodel.plan_of(model)
    merged = {}
    for file in (Path(folder) / "merged").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            merged |= dict.fromkeys(opened.keys(), file)
    num_unequal = 0
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            expected = layer.base_layer.weight.detach().clone()
            expected += layer.get_delta_weight("default").detach()
            with safe_open(merged[f"{name}.weight"], framework="pt") as opened:
                num_unequal += not torch.equal(opened.get_tensor(f"{name}.weight"), expected)
    shutil.rmtree(Path(folder) / "merged")
    return {
        "export_bytes": export_bytes,
        "unit_bytes": max(each.weight_bytes for each in plan.placements),
        "num_unequal": num_unequal,
    }


if __name__ == "__main__":
    main()
