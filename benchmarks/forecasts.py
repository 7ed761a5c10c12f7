"""Training forecasts: memory of a process and tokens/s, predicted before anything is read, against what was measured.

``python -m benchmarks.forecasts``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

from benchmarks.report import Figure, Report
from benchmarks.settings import Settings, parse_settings
from benchmarks.training import run_processes
from bigmodel.bench.harness import Bench

__all__: list[str] = []

MIB = 1 << 20
NUM_TOKENS = 256
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
    sizes, speeds, notes = [], [], []
    machine: dict[int, str] = {}
    for (name, (size, options)), (samples, recompute) in itertools.product(ENGINES.items(), SHAPES):
        asked = options | {"precision": "fp32", "activation_checkpointing": recompute}
        if size not in machine:
            machine[size] = run_processes(1, "calibrated", {"size": size})[0]["machine"]
        expected = run_processes(
            1,
            "expected",
            {
                "path": path,
                "size": size,
                "micro_batch_size": samples,
                "num_tokens": NUM_TOKENS,
                "machine": machine[size],
                **asked,
            },
        )[0]
        found = run_processes(
            size,
            "taken",
            {"path": path, "tiny": str(settings.tiny), "micro_batch_size": samples, "num_tokens": NUM_TOKENS, **asked},
        )
        rise = max(each["rise_bytes"] for each in found)
        tokens_per_s = size * samples * NUM_TOKENS / statistics.median(found[0]["seconds"])
        sizes.append(rise / expected["peak_bytes"])
        speeds.append(tokens_per_s / expected["tokens_per_s"])
        kinds = ", ".join(f"{kind} {each / MIB:.0f}" for kind, each in expected["bytes_by_kind"].items() if each)
        notes.append(
            f"{name}, {samples} x {NUM_TOKENS}, recomputation {recompute}: "
            f"{rise / MIB:.0f} of {expected['peak_bytes'] / MIB:.0f} MiB ({kinds}); "
            f"{tokens_per_s:.0f} of {expected['tokens_per_s']:.0f} tokens/s"
        )
        print(notes[-1], file=sys.stderr, flush=True)
    for what, ratios, limit in (("memory", sizes, 0.10), ("tokens/s", speeds, 0.15)):
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


if __name__ == "__main__":
    main()
