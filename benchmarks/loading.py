"""How long a load takes, what it costs and what it holds, against the disk and against the peers.

``python -m benchmarks.loading``; benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Figure, Report, median, quickest, ratios, seconds_of
from benchmarks.settings import BLOCK_BYTES, READER_COUNTS, Settings, parse_settings
from bigmodel.bench.harness import Bench, Outcome, Trial

__all__ = ["import_seconds"]

MIB = 1 << 20
# torch asks for huge pages only when told to; the peers are measured with both settings and the better counts.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
WITH_HUGE_PAGES = ", huge pages"

TRANSFORMERS = ("transformers", "transformers, device_map='cpu'", "transformers, device_map='auto'")
# (peer, its loaders, how many times faster): or, on a disk too slow for it, 0.85 of what the raw read would give.
COLD_PEERS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("transformers", TRANSFORMERS, 2.2),
    ("accelerate", ("accelerate",), 3.0),
    ("Run:ai streamer", ("Run:ai streamer",), 1.15),
)
WARM_COPYING = ("safetensors, copied", "Run:ai streamer")
FRACTION_OF_RAW = 0.85


def import_seconds() -> dict[str, Any]:
    """What ``import bigmodel`` adds to ``import torch`` in this process, and whether it brought transformers in.

    The package may import its parts when they are first asked for: ``with_loader_seconds`` is the import and the first
    look at ``bigmodel.load_sharded``.
    """
    start = time.perf_counter()
    importlib.import_module("torch")
    between = time.perf_counter()
    bigmodel = importlib.import_module("bigmodel")
    added = time.perf_counter() - between
    has_transformers = "transformers" in sys.modules
    assert callable(bigmodel.load_sharded)
    return {
        "seconds": added,
        "torch_seconds": between - start,
        "with_loader_seconds": time.perf_counter() - between,
        "has_transformers": has_transformers,
    }


def main() -> None:
    settings = parse_settings(__doc__ or "", ("cold", "warm", "import"))
    report = Report(f"loading-{settings.shape}", settings.configuration)
    # A copying loader touches the page cache and its copy: twice the files, and a little.
    with Bench(balloon_bytes=settings.num_bytes * 22 // 10) as bench:
        if settings.runs("import"):
            _import(bench, report, settings)
        if settings.runs("cold"):
            _cold(bench, report, settings)
        if settings.runs("warm"):
            _warm(bench, report, settings)
        print(report.markdown(bench))
        if settings.results is not None:
            print(f"written: {report.write(bench, settings.results)}", file=sys.stderr)


def _cold(bench: Bench, report: Report, settings: Settings) -> None:
    raw = [
        Trial(
            name=f"raw O_DIRECT, {count} threads",
            call="bigmodel.bench.raw_read:read_into_fresh_memory",
            arguments={"path": str(settings.path), "num_threads": count, "block_bytes": BLOCK_BYTES},
            files=settings.files,
        )
        for count in READER_COUNTS
    ]
    peers = {peer: _variants(bench, settings, loaders, is_cold=True) for peer, loaders, _ in COLD_PEERS}
    ours = _variants(bench, settings, ("bigmodel",), is_cold=True, huge_pages=(False,))
    outcomes = bench.interleaved(
        [*raw, *ours, *(trial for trials in peers.values() for trial in trials)], settings.num_rounds
    )
    report.keep(outcomes)
    best_raw = quickest(outcomes, [trial.name for trial in raw])
    own = outcomes[ours[0].name]
    if best_raw is None:
        bench.note("no raw read worked: is the checkpoint on a file system that reads with O_DIRECT? Give --out.")
        return
    report.add(
        Figure(
            name="load cold, its rate over the raw read's",
            values=ratios(outcomes[best_raw], own),
            limit=FRACTION_OF_RAW,
            is_upper=False,
            unit="x",
            note=f"raw: {best_raw}",
        )
    )
    report.add(
        Figure(
            name="load cold, CPU s per GB",
            values=[
                good.result["cpu_seconds"] / (good.result["num_bytes"] / 1e9) for good in own if good.error is None
            ],
            limit=0.15,
        )
    )
    for peer, _, times in COLD_PEERS:
        best = quickest(outcomes, [trial.name for trial in peers[peer]])
        if best is None:
            continue
        reachable = FRACTION_OF_RAW * median(seconds_of(outcomes[best])) / median(seconds_of(outcomes[best_raw]))
        report.add(
            Figure(
                name=f"load cold, times faster than {peer}",
                values=ratios(outcomes[best], own),
                limit=min(times, reachable),
                is_upper=False,
                unit="x",
                note=f"{best}" + (f"; the disk allows {reachable:.2f}x of {times}x" if reachable < times else ""),
            )
        )
    report.add(_peak_figure("load cold", own))
    _check_equal(bench, outcomes, [name for name in outcomes if not name.startswith("raw")])


def _warm(bench: Bench, report: Report, settings: Settings) -> None:
    ours = _variants(bench, settings, ("bigmodel",), is_cold=False, huge_pages=(False,))
    private = _variants(bench, settings, ("bigmodel, private",), is_cold=False, huge_pages=(False,))
    mapping = _variants(bench, settings, ("safetensors load_file",), is_cold=False, huge_pages=(False,))
    copying = _variants(bench, settings, WARM_COPYING, is_cold=False)
    outcomes = bench.interleaved([*ours, *private, *mapping, *copying], settings.num_rounds)
    report.keep(outcomes)
    own = outcomes[ours[0].name]
    good = [outcome.result for outcome in own if outcome.error is None]
    if not good:
        return
    mapped = median([result["mapped_bytes"] / result["num_bytes"] for result in good])
    kind = f"{100 * mapped:.0f}% of ours are pages of the file, {100 - 100 * mapped:.0f}% private memory"
    report.add(
        Figure(
            name="load warm, over safetensors load_file",
            values=ratios(own, outcomes[mapping[0].name]),
            limit=1.0,
            unit="x",
            note=kind,
        )
    )
    best = quickest(outcomes, [trial.name for trial in copying])
    if best is not None:
        report.add(
            Figure(
                name="load warm into private memory, times faster than the copying peers",
                values=ratios(outcomes[best], outcomes[private[0].name]),
                limit=3.0,
                is_upper=False,
                unit="x",
                note=best,
            )
        )
    report.add(_peak_figure("load warm", own))
    _check_equal(bench, outcomes, list(outcomes))


def _import(bench: Bench, report: Report, settings: Settings) -> None:
    trial = Trial(
        name="import bigmodel after torch",
        call="benchmarks.loading:import_seconds",
        arguments={},
        # As for a user: with compiled files, whatever the shell of the benchmark forbids.
        environment={"PYTHONDONTWRITEBYTECODE": ""},
    )
    bench.run(trial)  # compiled files and pages of the libraries are there for all that follow
    outcomes = bench.interleaved([trial], max(settings.num_rounds, 2 * settings.num_rounds - 1))
    report.keep(outcomes)
    good = [outcome.result for outcome in outcomes[trial.name] if outcome.error is None]
    report.add(
        Figure(
            name="import bigmodel, added to import torch",
            values=[result["seconds"] for result in good],
            limit=0.15,
            unit=" s",
            note=f"import torch: {median([result['torch_seconds'] for result in good]):.2f} s",
        )
    )
    report.add(
        Figure(
            name="the same, with load_sharded looked up",
            values=[result["with_loader_seconds"] for result in good],
            unit=" s",
        )
    )
    report.add(
        Figure(
            name="import bigmodel, runs that imported transformers",
            values=[float(sum(result["has_transformers"] for result in good))] if good else [],
            limit=0.0,
            is_promise=True,
        )
    )


def _variants(
    bench: Bench,
    settings: Settings,
    loaders: Sequence[str],
    *,
    is_cold: bool,
    huge_pages: Sequence[bool] = (False, True),
) -> list[Trial]:
    """A trial for each loader and allocator setting, with what it imports known."""
    trials = []
    for loader in loaders:
        known: tuple[str, ...] | None = None
        for is_huge in huge_pages:
            trial = Trial(
                name=f"{'cold' if is_cold else 'warm'}: {loader}{WITH_HUGE_PAGES if is_huge else ''}",
                call="benchmarks.loaders:load_and_touch",
                arguments={"loader": loader, "path": str(settings.path)},
                files=settings.files,
                is_cold=is_cold,
                environment=HUGE_PAGES if is_huge else {},
                modules=known or (),
            )
            if known is None:
                trial = bench.with_modules(trial, {"loader": loader, "path": str(settings.tiny)})
                known = tuple(trial.modules)
            trials.append(trial)
    return trials


def _peak_figure(name: str, outcomes: Sequence[Outcome]) -> Figure:
    """What a load holds beyond 1.02 times the resident bytes; mapped pages of resident weights count."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    return Figure(
        name=f"{name}, peak memory beyond 1.02 x resident bytes",
        values=[
            (outcome.peak_rise_bytes + outcome.result["mapped_bytes"] - 1.02 * outcome.result["num_bytes"]) / MIB
            for outcome in good
        ],
        limit=150.0,
        is_promise=True,
        unit=" MiB",
    )


def _check_equal(bench: Bench, outcomes: dict[str, list[Outcome]], names: Sequence[str]) -> None:
    """A loader that gave other weights than the rest has not done the work."""
    sums = {
        (outcome.result["checksum"], outcome.result["num_weights"])
        for name in names
        for outcome in outcomes[name]
        if outcome.error is None
    }
    if len(sums) > 1:
        bench.note(f"the candidates did not load the same weights: {len(sums)} different checksums.")


if __name__ == "__main__":
    main()
