"""What a plan says before anything is loaded, against what happens: time to first token, time per token, peak memory.

``python -m benchmarks.plans``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Figure, Report, ratios
from benchmarks.settings import Settings, parse_settings
from benchmarks.shapes import MODELS_FOR_MACHINES, accelerate_map
from bigmodel.bench.harness import Bench, Outcome, Trial

__all__: list[str] = []

MIB = 1 << 20
PROMPT_TOKENS, NEW_TOKENS, NUM_STEPS = 512, 16, 6
# Whose plans are timed.
LARGE = ("Llama-3.1-405B", "DeepSeek-V3", "BLOOM-176B")
# From everything on disk to everything resident.
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    settings = parse_settings(__doc__ or "", ("prediction", "spread", "maps", "machines", "planner"))
    # Rates are measured now, and kept where only this run finds them.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        import bigmodel

        machine = bigmodel.Machine.calibrate(settings.path)
        workload = bigmodel.Workload(prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
        all_away = bigmodel.make_plan(settings.path, workload=workload, device_map={"": "disk"})
        all_here = bigmodel.make_plan(settings.path, workload=workload, device_map="cpu")
        least, most = (plan.estimate.peak_bytes["cpu"] for plan in (all_away, all_here))
        budgets = [int(least + fraction * (most - least)) for fraction in FRACTIONS]
        configuration = settings.configuration | {
            "workload": f"prompt {PROMPT_TOKENS}, then {NUM_STEPS} timed steps, batch 1",
            "max_memory": ", ".join(f"{budget // MIB}" for budget in budgets) + " MiB",
            "rates": f"disk {machine.disk_read_bytes_per_s / 1e9:.2f} GB/s, {machine.rates_from}",
        }
        report = Report(f"plans-{settings.shape}", configuration)
        with Bench(balloon_bytes=settings.num_bytes * 12 // 10) as bench:
            if settings.runs("prediction"):
                _prediction(bench, report, settings, budgets)
            layers = sorted({p.unit for p in all_here.placements if ".layers." in p.unit}, key=_number)
            if settings.runs("spread"):
                _spread(bench, report, settings, layers, most)
            if settings.runs("maps"):
                _maps(bench, report, settings, budgets[len(budgets) // 2])
            if settings.runs("machines"):
                _machines(bench, report, settings)
            if settings.runs("planner"):
                _planner(bench, report, settings)
            print(report.markdown(bench))
            if settings.results is not None:
                print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)


def _trial(settings: Settings, name: str, options: dict[str, Any]) -> Trial:
    balloon_bytes = int(options["max_memory"]["cpu"]) + 128 * MIB
    return Trial(
        name=name,
        call="benchmarks.streams:run_planned",
        arguments={
            "path": str(settings.path),
            "options": options,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "num_steps": NUM_STEPS,
        },
        files=settings.files,
        # What is not taken at once goes back to the host while the first pass runs, and takes a processor for that.
        balloon_bytes=balloon_bytes,
    )


def _prediction(bench: Bench, report: Report, settings: Settings, budgets: Sequence[int]) -> None:
    import bigmodel

    # The first and the last are the maps themselves: what `auto` finds in that room is one of those between.
    trials = []
    for fraction, budget in zip(FRACTIONS, budgets, strict=True):
        options: dict[str, Any] = {"max_memory": {"cpu": budget}}
        if fraction == 0.0:
            options["device_map"] = {"": "disk"}
        trial = _trial(settings, f"auto, {fraction:.0%} of the way to all resident ({budget // MIB} MiB)", options)
        trials.append(bench.with_modules(trial, {**trial.arguments, "path": str(settings.tiny), "options": {}}))
    # What the machine's processors and disk give changes from minute to minute: each round has rates of its own.
    outcomes: dict[str, list[Outcome]] = {trial.name: [] for trial in trials}
    for _ in range(settings.num_rounds):
        bigmodel.Machine.calibrate(settings.path)
        for name, found in bench.interleaved(trials, 1).items():
            outcomes[name] += found
    report.keep(outcomes)
    errors: dict[str, list[float]] = {"time per token": [], "time to first token": []}
    for trial in trials:
        good = [outcome.result for outcome in outcomes[trial.name] if outcome.error is None]
        if not good:
            continue
        for what, key in (("time per token", "time_per_token_s"), ("time to first token", "ttft_s")):
            measured = [
                statistics.median(each["seconds"]) if what == "time per token" else each["ttft_s"] for each in good
            ]
            predicted = [each["predicted"][key] for each in good]
            off = [said / real - 1 for said, real in zip(predicted, measured, strict=True)]
            errors[what].append(abs(statistics.median(off)))
            report.add(
                Figure(
                    name=f"{trial.name}: {what}, predicted over measured",
                    values=[1 + each for each in off],
                    unit="x",
                    note=f"{statistics.median(predicted):.3f} s predicted, {statistics.median(measured):.3f} s measured",
                )
            )
        peaks = [
            (outcome.peak_rise_bytes + outcome.result["mapped_bytes"])
            / outcome.result["predicted"]["peak_bytes"]["cpu"]
            for outcome in outcomes[trial.name]
            if outcome.error is None
        ]
        report.add(
            Figure(
                name=f"{trial.name}: peak memory, measured over predicted",
                values=peaks,
                limit=1.0,
                is_promise=True,
                unit="x",
                note=f"at most 10% above wanted: {'met' if statistics.median(peaks) >= 1 / 1.1 else 'MISSED'}",
            )
        )
    for what, values in errors.items():
        report.add(Figure(name=f"{what}, error over the budgets (median <= 10%)", values=values, limit=0.10))
        report.add(Figure(name=f"{what}, worst budget (<= 25%)", values=[max(values)] if values else [], limit=0.25))


def _spread(bench: Bench, report: Report, settings: Settings, layers: Sequence[str], most: int) -> None:
    """Half of the layers resident: spread evenly, or all of those that stream at the end."""
    middle = len(layers) // 2
    maps = {
        "spread evenly": {name: "cpu" if number % 2 else "disk" for number, name in enumerate(layers)},
        "at the tail": {name: "cpu" if number < middle else "disk" for number, name in enumerate(layers)},
    }
    trials = []
    for name, homes in maps.items():
        options = {"device_map": {"": "cpu", **homes}, "max_memory": {"cpu": most}}
        trial = _trial(settings, f"half of the layers resident, {name}", options)
        trials.append(bench.with_modules(trial, {**trial.arguments, "path": str(settings.tiny), "options": {}}))
    outcomes = bench.interleaved(trials, settings.num_rounds)
    report.keep(outcomes)
    spread, tail = (outcomes[trial.name] for trial in trials)
    for key, what in (("seconds", "step"), ("ttft_s", "first pass")):
        predicted = _predicted(tail, key) / _predicted(spread, key)
        measured = ratios(tail, spread, key)
        report.add(
            Figure(
                name=f"{what}: tail over spread, measured over predicted",
                values=[value / predicted for value in measured],
                limit=1.1,
                unit="x",
                note=f"{predicted:.3f}x predicted, {statistics.median(measured):.3f}x measured" if measured else "",
            )
        )


def _planner(bench: Bench, report: Report, settings: Settings) -> None:
    """How long planning takes for models of hundreds of billions of parameters on eight accelerators."""
    trials = []
    for shape in LARGE:
        trial = Trial(
            name=f"plan of {shape} on eight accelerators",
            call="benchmarks.shapes:plan_shape",
            arguments={"shape": shape, "machine": "server-8x80gb"},
        )
        trials.append(bench.with_modules(trial, trial.arguments))
    outcomes = bench.interleaved(trials, settings.num_rounds)
    report.keep(outcomes)
    for trial in trials:
        good = [outcome.result for outcome in outcomes[trial.name] if outcome.error is None]
        note = ""
        if good:
            last = good[-1]
            note = (
                f"{last['num_units']} units, {last['weight_bytes'] / 1e9:.0f} GB, "
                f"{last['streamed_bytes'] / 1e9:.0f} GB streamed, "
                f"{last['time_per_token_s']:.3g} s per token, {last['binds'].get('decode', '')} binds"
            )
        seconds = [each["seconds"] for each in good]
        report.add(
            Figure(name=f"{trial.name}, model building included", values=seconds, limit=5.0, unit=" s", note=note)
        )


def _predicted(outcomes: Sequence[Outcome], key: str) -> float:
    name = {"seconds": "time_per_token_s", "ttft_s": "ttft_s"}[key]
    return statistics.median(each.result["predicted"][name] for each in outcomes if each.error is None)


def _maps(bench: Bench, report: Report, settings: Settings, budget: int) -> None:
    """`auto` against the map that Accelerate's infer_auto_device_map gives in the same room."""
    import bigmodel

    workload = bigmodel.Workload(prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    plan = bigmodel.make_plan(settings.path, workload=workload, max_memory={"cpu": budget})
    room = plan.resident_bytes  # what is left for weights beside slots, cache and activations
    theirs = accelerate_map(settings.path, {"cpu": room})
    trials = []
    for name, options in (("auto", {}), ("accelerate's map", {"device_map": theirs})):
        trial = _trial(settings, f"{name} in {budget // MIB} MiB", {"max_memory": {"cpu": budget}, **options})
        trials.append(bench.with_modules(trial, {**trial.arguments, "path": str(settings.tiny), "options": {}}))
    outcomes = bench.interleaved(trials, settings.num_rounds)
    report.keep(outcomes)
    report.add(
        Figure(
            name="step time of auto over that of Accelerate's map",
            values=ratios(outcomes[trials[0].name], outcomes[trials[1].name]),
            limit=1.0,
            unit="x",
        )
    )


def _machines(bench: Bench, report: Report, settings: Settings) -> None:
    """The same, predicted, for machines that are somewhere else."""
    from bigmodel.device_map.machine import SHIPPED

    for machine in sorted(file.stem for file in SHIPPED.glob("*.json")):
        for shape in MODELS_FOR_MACHINES:
            trial = Trial(
                name=f"{shape} on {machine}",
                call="benchmarks.shapes:compare_maps",
                arguments={"shape": shape, "machine": machine},
            )
            outcome = bench.run(trial)
            if outcome.error is not None:
                bench.note(f"{trial.name}: {outcome.error}")
                continue
            found = outcome.result
            for other in ("sequential", "Accelerate's map"):
                mine, theirs = found["auto"], found[other]
                note, values = "", []
                if mine is None:
                    note = "auto: does not fit"
                elif theirs is None:
                    note = f"{mine['step_s']:.4g} s per token; {other}: does not fit"
                else:
                    values = [mine["step_s"] / theirs["step_s"]]
                    note = f"{mine['step_s']:.4g} s per token, {other} {theirs['step_s']:.4g} s"
                report.add(
                    Figure(
                        name=f"predicted step, {trial.name}: auto over {other}",
                        values=values,
                        limit=1.0 + 1e-9,
                        unit="x",
                        note=note,
                    )
                )


def _number(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


if __name__ == "__main__":
    main()
