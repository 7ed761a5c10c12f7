"""What came of a benchmark: every figure beside its prediction and the machine's bound, as a table and as data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bigmodel.bench.clock import first_difference
from bigmodel.bench.harness import Outcome
from bigmodel.device_map.explanation import format_seconds
from bigmodel.device_map.picture import draw_measured
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.simulation import Step
from bigmodel.errors import BenchmarkError
from bigmodel.units import format_bytes

__all__ = ["Case", "Figure", "Measured", "Result"]

_VERSION = 1
_MEANINGS = (
    "bound: the least time, or the most tokens/s, that the named resource of this machine allows, at the rate measured in this "
    "run; of a peak, the limit. reached: the fraction of it.",
    "A cold load is bound by the disk, read straight into place; a warm one by memory, each byte being read from the page cache "
    "and written. Both clocks hold the planning, and so do their predictions, but not their bounds.",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload that is measured.

    Attributes:
        workload: that is planned for.
        num_tokens: that are generated; 1 where only the first pass counts.
        planning_s: that building the module and planning took here, which a load does too; None where it is not known.
        stall_s: in which a step is predicted to wait for weights; likewise.
    """

    workload: Workload
    num_tokens: int
    planning_s: float | None = field(default=None, compare=False)
    stall_s: float | None = field(default=None, compare=False)

    @property
    def title(self) -> str:
        """As tables name it."""
        size = self.workload.batch_size
        steps = f", {self.num_tokens} generated" if self.num_tokens > 1 else ""
        return f"{size} x {self.workload.prompt_tokens} tokens{steps}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row: a sample of each round, what was predicted, and the least that the machine allows.

    Attributes:
        name: what it is.
        unit: "s", "bytes" or "tokens/s".
        measured: samples.
        predicted: by the plan; None where it predicts nothing.
        bound: of each round; empty where there is none.
        binds: the resource that the bound is of.
    """

    name: str
    unit: str
    measured: tuple[float, ...]
    predicted: float | None = None
    bound: tuple[float, ...] = ()
    binds: str = ""

    @property
    def fractions(self) -> list[float]:
        """Of the bound that each round reached: 1 is all that the machine allows; empty for bytes, whose limit is no aim."""
        if self.unit == "bytes":
            return []
        is_rate = self.unit == "tokens/s"
        pairs = zip(self.measured, self.bound, strict=False)
        return [(value / bound if is_rate else bound / value) for value, bound in pairs if value and bound]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The runs of one case.

    Attributes:
        case: that was run.
        runs: what `run_model` gave in each round, with the peak of host memory; or the error.
        warm: likewise, of loads with the files in the page cache.
    """

    case: Case
    runs: tuple[Mapping[str, Any], ...]
    warm: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, case: Case, outcomes: Sequence[Outcome], warm: Sequence[Outcome]) -> Measured:
        """From the harness's outcomes."""
        return cls(case=case, runs=tuple(map(_run, outcomes)), warm=tuple(map(_run, warm)))

    @property
    def good(self) -> list[Mapping[str, Any]]:
        """The runs that worked."""
        return [run for run in self.runs if "error" not in run]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A benchmark's outcome.

    Attributes:
        path, num_bytes: of the checkpoint, and of its weight files.
        ram_bytes: of the control group around each run; None where there was none.
        limits: tier -> bytes, as `max_memory` was stated.
        machine: its measured rates, as a machine file has them.
        cases: the first is also that of loads and peers.
        disk: number of readers -> bytes/s in each round.
        peers: title -> each round's run.
        guesses: "lookup" or "draft" -> each round's run, with guessed tokens and without.
        left_out: peers that did not run -> why.
        recorded: what `run_recorded` gave; None where it was not asked for, or failed.
        was_interrupted: whether there are fewer rounds than were asked for.
        notes: what a reader must know.
        environment: versions and hardware.
    """

    path: str
    num_bytes: int
    ram_bytes: int | None
    limits: Mapping[str, int]
    machine: Mapping[str, Any]
    cases: tuple[Measured, ...]
    disk: Mapping[int, Sequence[float]]
    peers: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    guesses: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    recorded: Mapping[str, Any] | None = None
    was_interrupted: bool = False
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def disk_rate(self, number: int) -> float:
        """Bytes/s of a round's plain reads, by as many readers as were fastest over all rounds; 0 where they failed."""
        best = max(self.disk, key=lambda count: statistics.median(self.disk[count] or [0.0]))
        rates = self.disk[best]
        return rates[number] if number < len(rates) else 0.0

    @property
    def figures(self) -> list[Figure]:
        """All rows about bigmodel, in order."""
        return [figure for number, case in enumerate(self.cases) for figure in self._of(case, is_first=not number)]

    def _of(self, measured: Measured, *, is_first: bool) -> Iterator[Figure]:
        good = [(number, run) for number, run in enumerate(measured.runs) if "error" not in run]
        if not good:
            return
        plan = good[0][1]["plan"]
        estimate, workload = plan["estimate"], plan["workload"]
        tokens, size = workload["prompt_tokens"], workload["batch_size"]
        if is_first:
            loads = [self._load_bound_s(number, run) for number, run in good]
            yield Figure(
                name="load and planning, page cache cold",
                unit="s",
                measured=tuple(run["load_s"] for _, run in good),
                predicted=_sum(estimate["load_s"], measured.case.planning_s),
                bound=tuple(loads) if all(loads) else (),
                binds="disk" if all(loads) else "",
            )
            warm = tuple(run["load_s"] for run in measured.warm if "error" not in run)
            copied = self._copy_bound_s(good[0][1])
            yield Figure(
                # Another process fills the page cache, which no control group of this one's would have to hold.
                name="load and planning, page cache warm" + (", files outside the limit" if self.ram_bytes else ""),
                unit="s",
                measured=warm,
                predicted=_sum(copied, measured.case.planning_s),
                bound=(copied,) * len(warm) if copied else (),
                binds="memory of cpu" if copied else "",
            )
        bounds = [self._bound("prefill", number, run) for number, run in good]
        yield Figure(
            name=f"first token, {size} x {tokens} tokens",
            unit="s",
            measured=tuple(run["ttft_s"] for _, run in good),
            predicted=estimate["ttft_s"],
            bound=tuple(bound for _, bound in bounds),
            binds=_commonest(name for name, _ in bounds),
        )
        if good[0][1]["seconds"]:
            yield from self._of_steps(good, size, measured.case.stall_s)
        for tier, peaks in _peaks(run for _, run in good).items():
            limit = plan["limits"].get(tier)
            yield Figure(
                name=f"peak of {'host memory' if tier == 'cpu' else tier}, {size} x {tokens} tokens",
                unit="bytes",
                measured=peaks,
                predicted=estimate["peak_bytes"].get(tier),
                bound=(limit,) * len(peaks) if limit else (),
                binds="limit" if limit else "",
            )

    def _of_steps(
        self, good: Sequence[tuple[int, Mapping[str, Any]]], size: int, stall_s: float | None
    ) -> Iterator[Figure]:
        plan = good[0][1]["plan"]
        estimate = plan["estimate"]
        steps = tuple(statistics.median(run["seconds"]) for _, run in good)
        bounds = [self._bound("decode", number, run) for number, run in good]
        least, binds = tuple(bound for _, bound in bounds), _commonest(name for name, _ in bounds)
        title = "1 sequence" if size == 1 else f"{size} sequences"
        yield Figure(
            name=f"step of {title}",
            unit="s",
            measured=steps,
            predicted=estimate["time_per_token_s"],
            bound=least,
            binds=binds,
        )
        yield Figure(
            name=f"throughput of {title}",
            unit="tokens/s",
            measured=tuple(size / step for step in steps),
            predicted=estimate["tokens_per_s"],
            bound=tuple(size / bound for bound in least if bound),
            binds=binds,
        )
        for name, what, tiers in (
            ("read_bytes", "read", ("disk",)),
            ("copied_bytes", "copied to devices", ("disk", "cpu")),
        ):
            counts = tuple(run[name] for _, run in good)
            if any(counts) or what == "read" or plan["run_devices"] != ["cpu"]:
                streamed = sum(plan["streamed_bytes"]["decode"][tier] for tier in tiers)
                yield Figure(name=f"{what} per step of {title}", unit="bytes", measured=counts, predicted=streamed)
        stalls = tuple(run["stall_s"] for _, run in good)
        yield Figure(name=f"waiting for weights per step of {title}", unit="s", measured=stalls, predicted=stall_s)

    def _load_bound_s(self, number: int, run: Mapping[str, Any]) -> float:
        """What reading the weights that stay takes; those that are mapped are read by the first pass."""
        rate = self.disk_rate(number)
        return max(0, run["plan"]["resident_bytes"] - run["mapped_bytes"]) / rate if rate else 0.0

    def _copy_bound_s(self, run: Mapping[str, Any]) -> float:
        """What it takes to copy the weights that stay from the page cache: each byte is read and written."""
        rate = self.machine.get("host", {}).get("memory_bytes_per_s")
        num_bytes = max(0, run["plan"]["resident_bytes"] - run["mapped_bytes"])
        return 2.0 * num_bytes / float(rate) if rate else 0.0

    def _bound(self, phase: str, number: int, run: Mapping[str, Any]) -> tuple[str, float]:
        """The resource that needs longest for a pass, and how long; the disk at what it gave in that round."""
        plan, rate = run["plan"], self.disk_rate(number)
        least = dict(plan["estimate"].get("least_s", {}).get(phase, {}))
        num_bytes = plan["streamed_bytes"][phase]["disk"]
        if phase == "prefill":
            num_bytes += run["mapped_bytes"]  # of files that no cache held
        if rate and num_bytes:
            least["disk"] = num_bytes / rate
        binds = max(least, key=lambda name: least[name], default="")
        return binds, least.get(binds, 0.0)

    def compared(self) -> list[dict[str, Any]]:
        """For each peer, one sample a round: ``step_s`` and its ``ratio`` to ours, ``ttft_s``, ``load_s``, ``peak_bytes``.

        And ``title``, ``settings``; ``differs_at``, the first token (from 0) that is not ours, None where all are equal;
        ``bound_ratio``, the peer's step over the bound of ours, the most by which anything could be faster.
        """
        rows = []
        own = self.cases[0]
        for title, runs in self.peers.items():
            pairs = [
                (number, ours, theirs)
                for number, (ours, theirs) in enumerate(zip(own.runs, runs, strict=False))
                if "error" not in ours and "error" not in theirs
            ]
            if not pairs:
                continue
            steps = [statistics.median(theirs["seconds"]) for _, _, theirs in pairs]
            own_steps = [statistics.median(ours["seconds"]) for _, ours, _ in pairs]
            bounds = [self._bound("decode", number, ours)[1] for number, ours, _ in pairs]
            differences = [first_difference(ours["tokens"], theirs["tokens"]) for _, ours, theirs in pairs]
            rows.append(
                {
                    "title": title,
                    "step_s": steps,
                    "ratio": [step / own_step for step, own_step in zip(steps, own_steps, strict=True)],
                    "bound_ratio": [step / bound for step, bound in zip(steps, bounds, strict=True) if bound],
                    "ttft_s": [theirs["ttft_s"] for _, _, theirs in pairs],
                    "load_s": [theirs["load_s"] for _, _, theirs in pairs],
                    "peak_bytes": [theirs["peak_bytes"] for _, _, theirs in pairs],
                    "differs_at": min((at for at in differences if at is not None), default=None),
                    "settings": pairs[0][2]["settings"],
                }
            )
        return rows

    def failures(self) -> dict[str, str]:
        """What did not run, or failed in some rounds -> how often, and why."""
        runs = {measured.case.title: measured.runs for measured in self.cases} | dict(self.peers) | dict(self.guesses)
        told = {title: f"did not run: {error}" for title, error in self.left_out.items()}
        for title, each in runs.items():
            errors = [run["error"] for run in each if "error" in run]
            if errors:
                told[title] = f"failed in {len(errors)} of {len(each)} rounds: {errors[-1]}"
        return told

    def _conditions(self) -> Iterator[str]:
        """Under which all of it was measured, a sentence each."""
        num_rounds = max((len(measured.runs) for measured in self.cases), default=0)
        yield f"{num_rounds} round{'s' if num_rounds != 1 else ''} of everything in turn, a new process for each run"
        if self.ram_bytes is not None:
            yield f"each run in a control group of {format_bytes(self.ram_bytes)}, page cache included"
        if self.limits:
            yield "max_memory: " + ", ".join(f"{tier} {format_bytes(size)}" for tier, size in self.limits.items())
        rates = {count: statistics.median(each) for count, each in self.disk.items() if each}
        if rates:
            best = max(rates, key=lambda count: rates[count])
            yield f"plain direct reads, by {best} at once: {format_bytes(rates[best])}/s"

    def table(self) -> str:
        """What a person reads."""
        lines = [f"{self.path}: {format_bytes(self.num_bytes)} of weights", *self._conditions()]
        heads = ["", "min", "median", "max", "predicted", "bound", "reached", "binds"]
        rows = [_cells(figure) for figure in self.figures]
        lines += ["", *_aligned([heads, *rows]), "", *_MEANINGS]
        for measured in self.cases:
            good = measured.good
            if good and good[-1].get("causes"):
                lines += [
                    "",
                    f"{measured.case.title}, in the last round:",
                    *(f"  {cause}" for cause in good[-1]["causes"]),
                ]
        compared = self.compared()
        if compared:
            heads = [
                "step of 1 sequence",
                "min",
                "median",
                "max",
                "times ours: min",
                "median",
                "max",
                "of its bound",
                "tokens",
            ]
            lines += ["", *_aligned([heads, *map(_peer_cells, compared)])]
            lines += ["", *(f"{row['title']}: {row['settings']}" for row in compared)]
        lines += [line for name, runs in self.guesses.items() for line in _guesses(name, runs)]
        lines += [f"{title} {error}" for title, error in self.failures().items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def page(self) -> str:
        """The figures, and what happened above what was predicted, as a page for a browser.

        Raises:
            BenchmarkError: nothing was recorded.
        """
        if self.recorded is None:
            raise BenchmarkError("There is no timeline to draw. " + " ".join(self.notes))
        rows = []
        for figure in self.figures:
            cells = _cells(figure)
            if figure.measured:
                rows.append(
                    (cells[0], f"{cells[2]} ({cells[1]} to {cells[3]})", cells[4], f"{cells[5]} {cells[7]}".strip())
                )
        measured, predicted = ([Step(**step) for step in self.recorded[kind]] for kind in ("measured", "predicted"))
        plan = Plan.from_json(json.dumps(self.recorded["plan"]))
        told = [*self._conditions(), *_MEANINGS, *(f"note: {note}" for note in self.notes)]
        return draw_measured(plan, predicted, measured, rows, title=self.path, told=told)

    def to_json(self) -> str:
        """All of it, every sample."""
        figures = [{**asdict(figure), "reached": figure.fractions} for figure in self.figures]
        described = {"version": _VERSION, **asdict(self), "figures": figures, "compared": self.compared()}
        return json.dumps(described, indent=1)


def _run(outcome: Outcome) -> Mapping[str, Any]:
    if outcome.error is not None:
        return {"error": outcome.error}
    kept = {name: value for name, value in outcome.result.items() if name != "ranges"}
    return {**kept, "peak_bytes": outcome.peak_rise_bytes, "group_peak_bytes": outcome.cgroup_peak_bytes}


def _sum(one: float, other: float | None) -> float | None:
    return None if other is None else one + other


def _peaks(runs: Any) -> dict[str, tuple[float, ...]]:
    """Tier -> each run's peak."""
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault("cpu", []).append(run["peak_bytes"] + run["mapped_bytes"])
        for device, size in run["device_peaks"].items():
            found.setdefault(device, []).append(size)
    return {tier: tuple(sizes) for tier, sizes in found.items()}


def _commonest(names: Iterator[str]) -> str:
    return statistics.mode(names)


def _cells(figure: Figure) -> list[str]:
    if not figure.measured:
        return [figure.name, *[""] * 7]
    spread = [_shown(pick(figure.measured), figure.unit) for pick in (min, statistics.median, max)]
    predicted = "" if figure.predicted is None else _shown(figure.predicted, figure.unit)
    bound = _shown(statistics.median(figure.bound), figure.unit) if figure.bound else ""
    reached = f"{statistics.median(figure.fractions):.0%}" if figure.fractions else ""
    return [figure.name, *spread, predicted, bound, reached, figure.binds]


def _peer_cells(row: Mapping[str, Any]) -> list[str]:
    picks = (min, statistics.median, max)
    steps = [format_seconds(pick(row["step_s"])) for pick in picks]
    ratios = [f"{pick(row['ratio']):.2f}" for pick in picks]
    bound = f"{statistics.median(row['bound_ratio']):.2f}" if row["bound_ratio"] else ""
    at = row["differs_at"]
    return [row["title"], *steps, *ratios, bound, "equal" if at is None else f"DIFFER from number {at}"]


def _guesses(name: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    good = [run for run in runs if "error" not in run]
    if not good:
        return
    plain, guessed = ([run[key] for run in good] for key in ("plain_s", "guessed_s"))
    times = [before / after for before, after in zip(plain, guessed, strict=True)]
    spread = ", ".join(f"{pick(times):.2f}" for pick in (min, statistics.median, max))
    yield ""
    yield (
        f"with --{name}: {format_seconds(statistics.median(guessed))} per token instead of "
        f"{format_seconds(statistics.median(plain))}; times faster: {spread} (min, median, max)"
    )
    last = good[-1]
    yield f"  {last['num_guesses']} guesses a pass, {statistics.median(run['tokens_per_pass'] for run in good):.2f} tokens a pass"
    if last["differs_at"] is None:
        yield "  the same tokens as without"
    else:
        yield (
            f"  the same tokens as without up to number {last['differs_at']}, where two logits were {last['gap']:.3g} apart "
            "(a pass of several tokens may round otherwise than passes of one)"
        )


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        return format_seconds(value) if value else "0"
    return format_bytes(value) if unit == "bytes" else f"{value:.3g}/s"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first and the last to the left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
