"""Training: what a load holds on each process, what engines give, what our own code takes.

``python -m benchmarks.training``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, Figure, Report
from benchmarks.settings import Settings, parse_settings
from bigmodel.bench.harness import Bench

__all__ = ["real_model", "run_processes"]

PARTS = ("memory", "exact", "resume", "engines", "engines-fp32", "collectives", "overhead", "loops", "exits")
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"strategy": "single"}),
    "DDP": (2, {"strategy": "ddp"}),
    "FSDP2": (2, {"strategy": "fsdp"}),
    "FSDP2, gathered weights kept": (2, {"strategy": "fsdp", "reshard_after_forward": False}),
    "ZeRO-1": (2, {"strategy": "zero1"}),
    "ZeRO-2": (2, {"strategy": "zero2"}),
    "ZeRO-3": (2, {"strategy": "zero3"}),
}
# Whose loop ours is compared with, in which engine and precision.
LOOPS = (
    ("DDP, float32, the loop itself (control)", "ddp", "fp32", "ours"),
    ("DDP, float32, by hand", "ddp", "fp32", "hand"),
    ("DDP, float32, Accelerate", "ddp", "fp32", "accelerate"),
    ("FSDP2, bfloat16, by hand", "fsdp", "bf16", "hand"),
    ("ZeRO-2, bfloat16, by hand", "zero2", "bf16", "hand"),
)
NUM_PAIRS, BLOCK_S = 20, 5.0
NUM_EXITS = 20
MIB = 1 << 20


def main() -> None:
    settings = parse_settings(__doc__ or "", PARTS)
    how = "over gloo, one thread each; 4 samples of 256 tokens a step, of 64 for engines and loops"
    configuration = settings.configuration | {"processes": how}
    report = Report("-".join(["training", settings.shape, *sorted(settings.only)]), configuration)
    with Bench(balloon_bytes=0) as bench:
        if settings.runs("memory"):
            _memory(report, settings)
        if settings.runs("exact"):
            _exact(report)
        if settings.runs("resume"):
            _resume(report, settings)
        for part, precision in (("engines", "bf16"), ("engines-fp32", "fp32")):
            if settings.runs(part):
                _engines(report, settings, precision)
        if settings.runs("collectives"):
            _collectives(report, settings)
        if settings.runs("overhead"):
            found = [run_processes(1, "overhead", {"strategy": "single"})[0] for _ in range(settings.num_rounds)]
            by_hand = statistics.median(1e6 * each["by_hand_s"] for each in found)
            report.add(
                Figure(
                    name="our time for a micro-batch",
                    values=[1e6 * each["seconds"] for each in found],
                    limit=300,
                    unit=" us",
                    note=f"beside {by_hand:.0f} us of the same loop by hand",
                )
            )
        if settings.runs("exits"):
            _exits(report, settings)
        if settings.runs("loops"):
            _loops(report, settings)
        print(report.markdown(bench))
        if settings.results is not None:
            print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)


def _memory(report: Report, settings: Settings) -> None:
    """Engines that read their own part from a path, on the process that held most."""
    for name in ("FSDP2", "ZeRO-3"):
        values, note = [], ""
        for _ in range(settings.num_rounds):
            found = run_processes(2, "load", _paths(settings) | ENGINES[name][1])
            allowed = [1.15 * each["own_bytes"] + each["unit_bytes"] + 150 * MIB for each in found]
            values.append(max(each["rise_bytes"] / limit for each, limit in zip(found, allowed, strict=True)))
            sizes = " and ".join(f"{each['rise_bytes'] / MIB:.0f}" for each in found)
            note = f"{sizes} MiB for {found[0]['own_bytes'] / MIB:.0f} MiB of parameters each"
        report.add(
            Figure(
                name=f"{name}, 2 processes, loading: peak over 1.15 x own parameters + largest unit + 150 MiB",
                values=values,
                limit=1.0,
                is_promise=True,
                note=note,
            )
        )


def _collectives(report: Report, settings: Settings) -> None:
    """What is sent for an optimizer step, of a float32 model; counts and bytes do not vary."""
    for name, (size, options) in ENGINES.items():
        if size == 1:
            continue
        for times in (1, 4):
            found = run_processes(
                size, "collectives", _paths(settings) | options | {"precision": "fp32", "accumulation": times}
            )[0]
            calls, by_hand = (
                "; ".join(
                    f"{kind} {each['count']:g}: {each['bytes'] / MIB:.2f} MiB"
                    for kind, each in sorted(found[of].items())
                )
                for of in ("calls", "by_hand")
            )
            ours, others = (sum(each["count"] for each in found[of].values()) for of in ("calls", "by_hand"))
            sent = sum(each["bytes"] for each in found["calls"].values())
            report.add(
                Figure(
                    name=f"{name}, {times} micro-batches: bytes of collectives over the model's",
                    values=[sent / found["model_bytes"]],
                    unit="x",
                    note=calls,
                )
            )
            report.add(
                Figure(
                    name=f"{name}, {times} micro-batches: collectives beyond a loop by hand",
                    values=[ours - others],
                    unit="",
                    limit=0,
                    is_promise=True,
                    note=f"by hand: {by_hand}",
                )
            )


def _exits(report: Report, settings: Settings) -> None:
    """Whether two processes that trained end by themselves."""
    engines = [options for size, options in ENGINES.values() if size > 1]
    failed = 0
    for number in range(NUM_EXITS):
        try:
            run_processes(
                2, "speed", {"path": str(settings.tiny), "tiny": str(settings.tiny), **engines[number % len(engines)]}
            )
        except subprocess.CalledProcessError:
            failed += 1
    report.add(Figure(name=f"of {NUM_EXITS} runs over all engines, that did not end well", values=[failed], limit=0))


def _loops(report: Report, settings: Settings) -> None:
    """The real model's tokens/s under us, over those of a loop by hand, and of Accelerate's."""
    path = real_model()
    for name, strategy, precision, other in LOOPS:
        arguments = {
            "strategy": strategy,
            "precision": precision,
            "other": other,
            "num_pairs": NUM_PAIRS,
            "block_s": BLOCK_S,
        }
        try:
            found = run_processes(2, "loops", {"path": path, **arguments})[0]
        except KeyboardInterrupt:  # those before are kept
            return
        low, high = _interval(found["ratios"])
        report.add(
            Figure(
                name=f"{name}: our tokens/s over its",
                values=found["ratios"],
                unit="x",
                note=f"95% of the median between {low:.3f} and {high:.3f}; blocks of {found['steps']} steps",
            )
        )
        print(f"{name}: {found}", file=sys.stderr, flush=True)


def real_model() -> str:
    made = subprocess.run([sys.executable, ROOT / "examples" / "make_smollm2.py"], stdout=-1, text=True, check=True)
    return made.stdout.strip()


def _exact(report: Report) -> None:
    """The real model on real text for 20 steps: every engine against one process in the same precision. Nothing in it varies."""
    import torch

    path, limits = real_model(), {"bf16": (2e-3, 1e-2), "fp32": (5e-6, 1e-5)}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, file: str, **asked: Any) -> tuple[list[float], Any]:
            size, options = ENGINES[name]
            out = str(Path(folder) / file)
            asked = {"path": path, "out": out, "micro_batch_size": 1, **options, **asked}
            losses = run_processes(size, "exact", asked)[0]["losses"]
            return losses, torch.load(out, weights_only=True, mmap=True)

        for precision, (of_loss, of_parameter) in limits.items():
            alone, *others = (name for name, (_, options) in ENGINES.items() if "reshard_after_forward" not in options)
            losses, parameters = run(alone, "alone", precision=precision)
            # The control: what any other order of sums may change as well.
            nudged = f"{alone}, every weight one float32 up"
            for name in (nudged, *others):
                again = name == nudged
                found, trained = run(alone if again else name, "other", precision=precision, nudged=again)
                differences = [abs(a - b) for a, b in zip(found, losses, strict=True)]
                largest = max(float((trained[key] - each).abs().max()) for key, each in parameters.items())
                what = f"{name}, {precision}, 20 steps of the real model on a text"
                loss, parameter = (None, None) if again else (of_loss, of_parameter)
                report.add(Figure(name=f"{what}: loss", values=[max(differences)], limit=loss, is_promise=not again))
                report.add(Figure(name=f"{what}: parameters", values=[largest], limit=parameter, is_promise=not again))
                steps = " ".join(f"{each:.1g}" for each in differences)
                print(
                    f"{what}: {max(differences):.3g}, {largest:.3g}; losses step by step: {steps}",
                    file=sys.stderr,
                    flush=True,
                )


def _resume(report: Report, settings: Settings) -> None:
    """To the first batch after a million samples, and after a hundred."""
    for count in (104, 1_000_000):
        found = [run_processes(1, "resume", {"num_consumed": count})[0] for _ in range(settings.num_rounds)]
        report.add(
            Figure(
                name=f"first batch after {count} samples: Accelerate's time over ours",
                values=[each["accelerates_s"] / each["ours_s"] for each in found],
                unit="x",
                note=f"ours {1e3 * statistics.median(each['ours_s'] for each in found):.1f} ms",
            )
        )


def _interval(values: list[float]) -> tuple[float, float]:
    """Of the median, by drawing the values again (percentile bootstrap, 2000 draws)."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def _paths(settings: Settings) -> dict[str, Any]:
    return {"path": str(settings.path), "tiny": str(settings.tiny)}


def _engines(report: Report, settings: Settings, precision: str) -> None:
    """The real model in all engines, in turn."""
    paths = _paths(settings) | {"path": real_model()}
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    num_whole = 0
    with contextlib.suppress(KeyboardInterrupt):  # whole rounds are kept
        for _ in range(settings.num_rounds):
            for name, (size, options) in ENGINES.items():
                found = run_processes(size, "speed", paths | options | {"precision": precision})
                runs.setdefault(name, []).append(found)
                print(f"{name}, {precision}: {found}", file=sys.stderr, flush=True)
            num_whole += 1
    for name, rounds in ((name, rounds[:num_whole]) for name, rounds in runs.items()):
        peaks = [max(each["rise_bytes"] for each in found) / MIB for found in rounds]
        report.add(
            Figure(
                name=f"{name}, {precision}, the real model: tokens/s",
                values=[found[0]["tokens_per_s"] for found in rounds],
                note=f"peak of a process {max(peaks, default=0):.0f} MiB",
            )
        )


def run_processes(size: int, call: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process of a new group found."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.training_runs"]
        subprocess.run([*launcher, *rendezvous, call, json.dumps(arguments), folder], cwd=ROOT, check=True)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


if __name__ == "__main__":
    main()
