"""A model that rests on disk: its decode step and its prefill against the peers, the disk and the resident model.

``python -m benchmarks.streaming``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.make_checkpoint import SHAPES
from benchmarks.report import Figure, Report, median, quickest, ratios, seconds_of
from benchmarks.settings import BLOCK_BYTES, READER_COUNTS, Settings, parse_settings
from bigmodel.bench.harness import Bench, Outcome, Trial
from bigmodel.bench.raw_read import Range, widened

__all__: list[str] = []

MIB = 1 << 20
PROMPT_TOKENS, NUM_STEPS = 16, 6
LONG_TOKENS, NUM_LONG = 512, 3
# Of the cgroup, for the interpreter, its libraries and the kernel's own pages; the rest is the host budget.
OUTSIDE_BUDGET_BYTES = 512 * MIB
SURVIVAL_MARGIN_BYTES = 64 * MIB
# A step gathers rows of the embedding table; everything else is read.
EMBEDDING = "model.embed_tokens.weight"
RING_LAYERS = 3

OURS, OURS_HALF, OURS_RESIDENT, SURVIVAL = (
    "bigmodel, all on disk",
    "bigmodel, half of the layers resident",
    "bigmodel, resident",
    "bigmodel, in a cgroup of baseline + peak + 64 MiB",
)
PEERS = ("transformers, all on disk", "accelerate disk_offload")
RESIDENT = ("transformers, resident (mapped)", "transformers, resident (copied)", OURS_RESIDENT)


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """Cgroup limits and host budgets in bytes: everything on disk, and half of the layers kept."""

    all_on_disk: int
    half_on_disk: int

    @classmethod
    def of(cls, settings: Settings) -> _Limits:
        # Below the checkpoint's size in both cases; for --quick the interpreter alone is larger than that.
        floor = OUTSIDE_BUDGET_BYTES + 448 * MIB
        return cls(
            all_on_disk=max(floor, settings.num_bytes * 625 // 1000) // MIB * MIB,
            half_on_disk=max(floor, settings.num_bytes * 920 // 1000) // MIB * MIB,
        )


def main() -> None:
    settings = parse_settings(__doc__ or "", ("decode", "long", "half", "memory"))
    limits = _Limits.of(settings)
    configuration = settings.configuration | {
        "passes": (
            f"{NUM_STEPS} decode steps after a prompt of {PROMPT_TOKENS}, {NUM_LONG} passes of {LONG_TOKENS}, batch 1"
        ),
        "cgroup": f"{limits.all_on_disk // MIB} MiB, with half of the layers resident {limits.half_on_disk // MIB} MiB",
        "max_memory": f"the cgroup less {OUTSIDE_BUDGET_BYTES // MIB} MiB",
    }
    report = Report(f"streaming-{settings.shape}", configuration)
    scratch = Path(tempfile.mkdtemp(prefix=".peers-", dir=settings.scratch))
    try:
        with Bench(balloon_bytes=settings.num_bytes * 12 // 10) as bench:
            _measure(bench, report, settings, limits, scratch)
            print(report.markdown(bench))
            if settings.results is not None:
                print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)
    finally:
        shutil.rmtree(scratch)


def _measure(bench: Bench, report: Report, settings: Settings, limits: _Limits, scratch: Path) -> None:
    trials = _trials(bench, settings, limits, scratch)
    outcomes = bench.interleaved(trials, settings.num_rounds)
    report.keep(outcomes)
    own = outcomes.get(OURS, [])
    best_raw = quickest(outcomes, [trial.name for trial in trials if trial.name.startswith("raw")])
    if settings.runs("decode"):
        _decode_figures(bench, report, outcomes, best_raw)
    if settings.runs("long"):
        resident = quickest(outcomes, RESIDENT, "long_seconds")
        if resident is not None:
            report.add(
                Figure(
                    name=f"a pass of {LONG_TOKENS} tokens, over the resident model's",
                    values=ratios(own, outcomes[resident], "long_seconds"),
                    limit=1.1,
                    unit="x",
                    note=f"{resident}: {median(seconds_of(outcomes[resident], 'long_seconds')):.2f} s",
                )
            )
    if settings.runs("half"):
        all_bytes, half_bytes = (_num_bytes(settings, left_out) for left_out in (_left_out(), _left_out(settings)))
        share = half_bytes / all_bytes
        report.add(
            Figure(
                name="half of the layers resident: time over all on disk, over the bytes' share",
                values=[value / share for value in ratios(outcomes[OURS_HALF], own)],
                limit=1.1,
                unit="x",
                note=f"reads {half_bytes / 1e9:.2f} of {all_bytes / 1e9:.2f} GB per step",
            )
        )
    if settings.runs("memory"):
        for name, limit in ((OURS, limits.all_on_disk), (OURS_HALF, limits.half_on_disk)):
            _memory_figures(report, name, outcomes.get(name, []), limit - OUTSIDE_BUDGET_BYTES)
        _survival(bench, report, settings, trials, own)
    _equality(report, outcomes)


def _trials(bench: Bench, settings: Settings, limits: _Limits, scratch: Path) -> list[Trial]:
    """The candidates that the chosen parts need."""
    layer_bytes = max(_layer_bytes(settings.path).values())
    trials = []
    if settings.runs("decode"):
        trials += [
            Trial(
                name=f"raw O_DIRECT into a ring, {count} threads",
                call="bigmodel.bench.raw_read:read_into_ring",
                arguments={
                    "ranges": _file_ranges(str(settings.path), list(_left_out())),
                    "num_threads": count,
                    "block_bytes": BLOCK_BYTES,
                    "ring_bytes": RING_LAYERS * layer_bytes,
                    "num_passes": 3,
                },
                files=settings.files,
            )
            for count in READER_COUNTS
        ]
    on_disk = {"device_map": {"": "disk"}, "max_memory": {"cpu": limits.all_on_disk - OUTSIDE_BUDGET_BYTES}}
    # The long pass is also where the most memory is held.
    has_long = settings.runs("long") or settings.runs("memory")
    trials.append(_run(bench, settings, OURS, "bigmodel", on_disk, limits.all_on_disk, has_long=has_long))
    if settings.runs("half"):
        options = {"device_map": _half_map(settings), "max_memory": {"cpu": limits.half_on_disk - OUTSIDE_BUDGET_BYTES}}
        trials.append(_run(bench, settings, OURS_HALF, "bigmodel", options, limits.half_on_disk))
    if settings.runs("decode"):
        for name, model in zip(PEERS, ("transformers, disk", "accelerate, disk_offload"), strict=True):
            options = {"offload_folder": str(scratch / model.partition(",")[0])}
            trial = _run(bench, settings, name, model, options, limits.all_on_disk)
            if model.startswith("accelerate"):
                # Writing its folder is not what is measured: once, without a limit, before the rounds.
                bench.run(dataclasses.replace(trial, limit_bytes=None))
            trials.append(trial)
    if settings.runs("decode") or settings.runs("long"):
        for name, model in zip(RESIDENT, ("transformers", "transformers, copied", "bigmodel"), strict=True):
            options = {"device_map": "cpu"} if model == "bigmodel" else {}
            trials.append(_run(bench, settings, name, model, options, None, has_long=settings.runs("long")))
    # What a peer wrote is dropped from the cache like the checkpoint itself.
    return [dataclasses.replace(trial, files=(*trial.files, *_files_of(trial))) for trial in trials]


def _run(
    bench: Bench,
    settings: Settings,
    name: str,
    model: str,
    options: Mapping[str, Any],
    limit_bytes: int | None,
    *,
    has_long: bool = False,
) -> Trial:
    arguments = {
        "model": model,
        "path": str(settings.path),
        "options": dict(options),
        "prompt_tokens": PROMPT_TOKENS,
        "num_steps": NUM_STEPS,
        "long_tokens": LONG_TOKENS if has_long else 0,
        "num_long": NUM_LONG if has_long else 0,
    }
    trial = Trial(
        name=name,
        call="benchmarks.streams:run_model",
        arguments=arguments,
        files=settings.files,
        is_cold=limit_bytes is not None,
        limit_bytes=limit_bytes,
    )
    tiny = arguments | {"path": str(settings.tiny), "options": _tiny_options(dict(options)), "long_tokens": 32}
    return bench.with_modules(trial, tiny)


def _tiny_options(options: dict[str, Any]) -> dict[str, Any]:
    """The same options for the small model: another folder, and a map of the layers that it has."""
    if "offload_folder" in options:
        options["offload_folder"] += "-tiny"
    if isinstance(options.get("device_map"), dict) and "" not in options["device_map"]:
        names = [name for name, _ in SHAPES["tiny"].tensors()]
        options["device_map"] = {
            module: home
            for module, home in options["device_map"].items()
            if any(name.startswith(f"{module}.") for name in names)
        }
    return options


def _half_map(settings: Settings) -> dict[str, str]:
    """Every second layer stays; the embedding is looked up, and the head streams in both cases."""
    layers = range(SHAPES[settings.shape].layers)
    homes = {f"model.layers.{layer}": "cpu" if layer % 2 else "disk" for layer in layers}
    return {"model.embed_tokens": "disk", **homes, "model.norm": "cpu", "lm_head": "disk"}


def _left_out(settings: Settings | None = None) -> tuple[str, ...]:
    """What a step does not read: the embedding table and, with settings, the layers that `_half_map` keeps."""
    kept = _half_map(settings).items() if settings is not None else ()
    return (EMBEDDING, *(f"{module}." for module, home in kept if home == "cpu"))


def _file_ranges(path: str, leave_out: Sequence[str]) -> list[Range]:
    """The aligned ranges of a checkpoint's tensors.

    Args:
        path: the checkpoint's folder.
        leave_out: names or prefixes (ending in a dot) of tensors that are not read.
    """
    prefixes = tuple(prefix for prefix in leave_out if prefix.endswith("."))
    ranges: list[Range] = []
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name not in leave_out and not name.startswith(prefixes):
                begin, end = entry["data_offsets"]
                ranges.append((str(file), 8 + length + begin, end - begin))
    return widened(ranges)


def _num_bytes(settings: Settings, left_out: Sequence[str]) -> int:
    return sum(size for _, _, size in _file_ranges(str(settings.path), list(left_out)))


def _layer_bytes(path: Path) -> dict[str, int]:
    """Bytes of each layer; a ring is a few of them."""
    shape = next(shape for name, shape in SHAPES.items() if name == path.name)
    sizes: dict[str, int] = {}
    for name, size in shape.tensors():
        if name.startswith("model.layers."):
            layer = ".".join(name.split(".")[:3])
            sizes[layer] = sizes.get(layer, 0) + 2 * size[0] * (size[1] if len(size) > 1 else 1)
    return sizes


def _files_of(trial: Trial) -> tuple[Path, ...]:
    folder = Path(str(trial.arguments.get("options", {}).get("offload_folder", "")) or "nowhere")
    return tuple(file for file in sorted(folder.rglob("*")) if file.is_file())


def _decode_figures(bench: Bench, report: Report, outcomes: dict[str, list[Outcome]], best_raw: str | None) -> None:
    resident, peer = quickest(outcomes, RESIDENT), quickest(outcomes, PEERS)
    own = outcomes[OURS]
    if best_raw is None or resident is None:
        bench.note("no raw read or no resident model worked: the bound of a step is not known.")
        return
    reading, computing = (median(seconds_of(outcomes[name])) for name in (best_raw, resident))
    bound = best_raw if reading >= computing else resident
    note = f"reading alone {reading:.3f} s ({best_raw}), resident step {computing:.3f} s ({resident})"
    if peer is not None:
        reachable = 0.9 * median(seconds_of(outcomes[peer])) / max(reading, computing)
        report.add(
            Figure(
                name="decode step, all on disk, times faster than the better peer",
                values=ratios(outcomes[peer], own),
                limit=min(3.0, reachable),
                is_upper=False,
                unit="x",
                note=peer + (f"; the bound allows {reachable:.2f}x of 3x" if reachable < 3.0 else ""),
            )
        )
    report.add(
        Figure(
            name="decode step, all on disk, over max(reading alone, resident step)",
            values=ratios(own, outcomes[bound]),
            limit=1.11,
            unit="x",
            note=note,
        )
    )


def _memory_figures(report: Report, name: str, outcomes: Sequence[Outcome], max_memory: int) -> None:
    good = [outcome for outcome in outcomes if outcome.error is None]
    if not good:
        return
    planned = [outcome.result["plan"]["peak_bytes"] for outcome in good]
    counted = [outcome.peak_rise_bytes + outcome.result["mapped_bytes"] for outcome in good]
    report.add(
        Figure(
            name=f"{name}: peak memory over the plan's",
            values=[real / stated for real, stated in zip(counted, planned, strict=True)],
            limit=1.0,
            is_promise=True,
            unit="x",
            note=f"{max(counted) / MIB:.0f} MiB seen, {max(planned) / MIB:.0f} MiB planned",
        )
    )
    report.add(
        Figure(
            name=f"{name}: the plan's peak over max_memory",
            values=[stated / max_memory for stated in planned],
            limit=1.0,
            is_promise=True,
            unit="x",
            note=f"max_memory {max_memory / MIB:.0f} MiB",
        )
    )


def _survival(bench: Bench, report: Report, settings: Settings, trials: list[Trial], own: Sequence[Outcome]) -> None:
    good = [outcome for outcome in own if outcome.error is None]
    if not good:
        return
    baseline = max(outcome.baseline_bytes for outcome in good)
    limit = baseline + good[0].result["plan"]["peak_bytes"] + SURVIVAL_MARGIN_BYTES
    trial = next(trial for trial in trials if trial.name == OURS)
    arguments = dict(trial.arguments) | {"prompt_tokens": LONG_TOKENS, "num_long": 0}
    trial = dataclasses.replace(trial, name=SURVIVAL, arguments=arguments, limit_bytes=limit)
    outcomes = bench.interleaved([trial], settings.num_rounds)
    report.keep(outcomes)
    report.add(
        Figure(
            name=f"survives a prompt of {LONG_TOKENS} and {NUM_STEPS} steps in baseline + planned peak + 64 MiB",
            values=[float(outcome.error is None) for outcome in outcomes[SURVIVAL]],
            limit=1.0,
            is_upper=False,
            is_promise=True,
            note=f"baseline {baseline / MIB:.0f} MiB, cgroup {limit / MIB:.0f} MiB",
        )
    )


def _equality(report: Report, outcomes: Mapping[str, list[Outcome]]) -> None:
    """Tokens and last logits of every candidate against the resident model's, bit for bit."""
    for key, fields in (("decode", ("tokens", "digest")), ("a long pass", ("long_digest",))):
        answers = {
            name: {tuple(map(str, (good.result[field] for field in fields))) for good in runs if not good.error}
            for name, runs in outcomes.items()
            if name != SURVIVAL and any(not run.error and fields[0] in run.result for run in runs)
        }
        expected = next((answers[name] for name in RESIDENT if name in answers), None)
        if expected is None:
            continue
        differing = [name for name, given in answers.items() if given != expected]
        report.add(
            Figure(
                name=f"{key}: candidates whose output differs from the resident model's",
                values=[float(len(differing))],
                limit=0.0,
                is_promise=True,
                note=", ".join(differing) or f"{len(answers)} compared",
            )
        )


if __name__ == "__main__":
    main()
