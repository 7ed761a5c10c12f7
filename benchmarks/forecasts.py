"""Training forecasts: memory of a process and tokens/s, predicted before anything is read, against what was measured.

``python -m benchmarks.forecasts``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

import psutil

from benchmarks.report import Figure, Report
from benchmarks.settings import Settings, parse_settings
from benchmarks.training import run_processes
from bigmodel.bench.harness import Bench

__all__: list[str] = []

MIB = 1 << 20
NUM_TOKENS = 256
MOST = 0.9  # of the free memory, by the prediction: what takes more is not run
# Elements that DeepSpeed reduces and gathers at once; its own defaults are larger than these models.
BUCKETS = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
ZERO = {"engine_options": {"zero_optimization": BUCKETS}}
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"strategy": "single"}),
    "DDP": (2, {"strategy": "ddp"}),
    "FSDP2": (2, {"strategy": "fsdp"}),
    "FSDP2, kept": (2, {"strategy": "fsdp", "reshard_after_forward": False}),
    "FSDP2, offloaded": (2, {"strategy": "fsdp", "offload_params": "cpu", "offload_optimizer": "cpu"}),
    "ZeRO-1": (2, {"strategy": "zero1", **ZERO}),
    "ZeRO-2": (2, {"strategy": "zero2", **ZERO}),
    "ZeRO-3": (2, {"strategy": "zero3", **ZERO}),
}
SHAPES = tuple(itertools.product((1, 4), ("off", "on")))


def main() -> None:
    settings = parse_settings(__doc__ or "", ("smollm2", "larger"))
    how = f"over gloo, one thread each, float32, AdamW; a pass of 1 or 4 samples of {NUM_TOKENS} tokens in each process"
    report = Report("-".join(["forecasts", *sorted(settings.only)]), settings.configuration | {"processes": how})
    with Bench(balloon_bytes=0) as bench:
        if settings.runs("smollm2"):
            from benchmarks.training import real_model

            _compare(report, settings, real_model(), "SmolLM2-135M")
        if settings.runs("larger"):
            _compare(report, settings, str(settings.path), settings.shape)
        print(report.markdown(bench))
        if settings.results is not None:
            print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)


def _compare(report: Report, settings: Settings, path: str, title: str) -> None:
    cases = [
        (
            name,
            size,
            options | {"precision": "fp32", "activation_checkpointing": recompute, "micro_batch_size": samples},
        )
        for (samples, recompute), (name, (size, options)) in itertools.product(SHAPES, ENGINES.items())
    ]
    machine, reference_s = {}, {}
    for size in (1, 2):
        before = run_processes(size, "reference", {})[0]["reference_s"]
        machine[size] = run_processes(1, "calibrated", {"size": size})[0]["machine"]
        after = run_processes(size, "reference", {})[0]["reference_s"]
        reference_s[size] = (before + after) / 2
    common = {"path": path, "num_tokens": NUM_TOKENS}
    expected: list[Any] = [None] * len(cases)
    for size, rates in machine.items():
        places = [place for place, case in enumerate(cases) if case[1] == size]
        asked = {"size": size, "machine": rates, "cases": [cases[place][2] for place in places]}
        ways = run_processes(1, "forecasts", asked | common)[0]["ways"]
        for place, way in zip(places, ways, strict=True):
            expected[place] = way
    sizes, speeds, as_then, notes = [], [], [], []
    measured: list[tuple[dict[str, Any], float, float]] = []  # of two processes with the larger passes
    for (name, size, asked), way in zip(cases, expected, strict=True):
        if size * way["peak_bytes"] > MOST * psutil.virtual_memory().available:
            told = (
                f"{name}, {asked['micro_batch_size']} x {NUM_TOKENS}, recomputation {asked['activation_checkpointing']}"
            )
            notes.append(f"{told}: not run, {size} x {way['peak_bytes'] / MIB:.0f} MiB are more than there is")
            print(notes[-1], file=sys.stderr, flush=True)
            continue
        found = run_processes(size, "taken", {"tiny": str(settings.tiny), **common, **asked})
        rise = max(each["rise_bytes"] for each in found)
        samples = asked["micro_batch_size"]
        tokens_per_s = size * samples * NUM_TOKENS / statistics.median(found[0]["seconds"])
        sizes.append(rise / way["peak_bytes"])
        slower = found[0]["reference_s"] / reference_s[size]
        speeds.append(tokens_per_s / way["tokens_per_s"])
        as_then.append(slower * speeds[-1])
        if size > 1 and samples == SHAPES[-1][0] and "offload_params" not in asked:  # which is nothing else on a host
            measured.append((asked, rise, slower * tokens_per_s))
        kinds = ", ".join(f"{kind} {each / MIB:.0f}" for kind, each in way["bytes_by_kind"].items() if each)
        notes.append(
            f"{name}, {samples} x {NUM_TOKENS}, recomputation {asked['activation_checkpointing']}: "
            f"{rise / MIB:.0f} of {way['peak_bytes'] / MIB:.0f} MiB ({kinds}); "
            f"{tokens_per_s:.0f} of {way['tokens_per_s']:.0f} tokens/s, the machine {slower:.2f} times as slow as when it was "
            "calibrated"
        )
        print(notes[-1], file=sys.stderr, flush=True)
    for what, ratios, limit in (
        ("memory", sizes, 0.10),
        ("tokens/s", speeds, 0.15),
        ("tokens/s, as fast as the machine was when it was calibrated", as_then, 0.15),
    ):
        errors = sorted(abs(each - 1) for each in ratios)
        report.add(
            Figure(
                name=f"{title}: error of predicted {what}, median over {len(ratios)} runs",
                values=[statistics.median(errors)],
                limit=limit,
                note=f"measured over predicted {min(ratios):.2f} to {max(ratios):.2f}; worst {errors[-1]:.0%}",
            )
        )
    report.add(
        Figure(
            name=f"{title}: measured memory over the prediction, at most",
            values=[max(sizes)],
            limit=1.05,
            is_promise=True,
            note="; ".join(notes),
        )
    )
    _choices(report, title, measured, {"size": 2, "machine": machine[2], **common})


def _choices(
    report: Report, title: str, measured: list[tuple[dict[str, Any], float, float]], asked: dict[str, Any]
) -> None:
    """What "auto" takes within three limits, against the fastest run that stayed within them, the machine equally fast."""
    peaks = sorted(rise for _, rise, _ in measured)
    limits = [1.1 * each for each in (peaks[0], statistics.median(peaks), peaks[-1])]
    cases = [measured[-1][0]]
    chosen = run_processes(1, "forecasts", asked | {"cases": cases, "limits": limits})[0]["chosen"]
    for limit, way in zip(limits, chosen, strict=True):
        fastest = max(speed for _, rise, speed in measured if rise <= limit)
        name = f'{title}: the fastest run within {limit / MIB:.0f} MiB of each process, over what "auto" takes'
        if way is None:
            report.add(Figure(name=name, values=[], limit=1.05, note='"auto" finds none that fits'))
            continue
        rise, speed = next(
            (rise, speed)
            for case, rise, speed in measured
            if case["strategy"] == way["strategy"]
            and case.get("reshard_after_forward", True) == way["reshard_after_forward"]
            and (case["activation_checkpointing"] == "on") == way["checkpoints"]
        )
        told = f"{way['strategy']}, kept" if not way["reshard_after_forward"] else way["strategy"]
        report.add(
            Figure(
                name=name,
                values=[fastest / speed],
                limit=1.05,
                note=f"{told}, recomputation {'on' if way['checkpoints'] else 'off'}: {rise / MIB:.0f} MiB"
                + ("" if rise <= limit else ", which is more than the limit"),
            )
        )


if __name__ == "__main__":
    main()
