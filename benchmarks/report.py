"""What a benchmark says: figures against their targets, every sample, and where it was measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.bench.harness import Bench, Outcome
from bigmodel.bench.result import Result

__all__ = ["ROOT", "Figure", "Report", "commit", "disk_of", "median", "quickest", "ratios", "seconds_of"]

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "diffusers",
    "safetensors",
    "runai-model-streamer",
    "xllamacpp",
    "airllm",
    "huggingface-hub",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: samples and the target that they must meet.

    Attributes:
        name: what it is.
        values: one sample per round.
        limit: what they are held against; None for a figure that is only reported.
        is_upper: whether `limit` is an upper bound.
        floor: a second bound, below, where `limit` is an upper one.
        is_promise: whether every sample must meet it, not just the median: memory, survival, exactness.
        unit: printed after the numbers.
        note: what the reader must know beside it.
    """

    name: str
    values: Sequence[float]
    limit: float | None = None
    is_upper: bool = True
    floor: float | None = None
    is_promise: bool = False
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        if not self.values:
            return "not measured"
        if self.limit is None:
            return "-"
        worst = max if self.is_upper else min
        value = worst(self.values) if self.is_promise else statistics.median(self.values)
        if self.floor is not None and (min(self.values) if self.is_promise else value) < self.floor:
            return "MISSED"
        return "met" if (value <= self.limit if self.is_upper else value >= self.limit) else "MISSED"

    @property
    def target(self) -> str:
        if self.floor is not None:
            return f"{self.floor:.3g} .. {self.limit:.3g}{self.unit}"
        return "-" if self.limit is None else f"{'<=' if self.is_upper else '>='} {self.limit:.3g}{self.unit}"

    def cells(self) -> list[str]:
        spread = (min, statistics.median, max)
        numbers = [f"{pick(self.values):.3g}{self.unit}" if self.values else "" for pick in spread]
        return [self.name, self.target, *numbers, self.verdict, self.note]


def median(values: Sequence[float]) -> float:
    """The median; not a number when there is no sample."""
    return statistics.median(values) if values else float("nan")


def seconds_of(outcomes: Sequence[Outcome], key: str = "seconds") -> list[float]:
    """One value per trial that worked: ``result[key]``, or the median of it where it is a list."""
    return [median(_as_list(outcome.result[key])) for outcome in outcomes if outcome.error is None]


def ratios(above: Sequence[Outcome], below: Sequence[Outcome], key: str = "seconds") -> list[float]:
    """Round by round, so that what changes between the rounds changes both sides; rounds where both worked."""
    return [
        median(_as_list(over.result[key])) / median(_as_list(under.result[key]))
        for over, under in zip(above, below, strict=False)
        if over.error is None and under.error is None
    ]


def quickest(outcomes: Mapping[str, list[Outcome]], names: Sequence[str], key: str = "seconds") -> str | None:
    """The name with the lowest median; None when none of them worked."""
    worked = [name for name in names if seconds_of(outcomes.get(name, ()), key)]
    return min(worked, key=lambda name: median(seconds_of(outcomes[name], key)), default=None)


class Report:
    """Collects figures and samples, and writes them with their circumstances.

    Attributes:
        result: of `bigmodel bench`, where the figures are of one: its table and samples take the candidates' place.

    Args:
        name: of the result files.
        configuration: what was run: shapes, sizes, limits, rounds.
    """

    def __init__(self, name: str, configuration: Mapping[str, Any]) -> None:
        self.name = name
        self.configuration = dict(configuration)
        self.figures: list[Figure] = []
        self.outcomes: dict[str, list[Outcome]] = {}
        self.result: Result | None = None
        self._load_at_start = os.getloadavg()[0]

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)

    def keep(self, outcomes: Mapping[str, list[Outcome]]) -> None:
        """Every sample of these trials goes into the result files."""
        self.outcomes.update(outcomes)

    def markdown(self, bench: Bench | Result) -> str:
        """The result as a page."""
        lines = [f"# {self.name}, {datetime.date.today().isoformat()}", ""]
        lines += [f"- {key}: {value}" for key, value in self._circumstances().items()]
        lines += [f"- {key}: {value}" for key, value in self.configuration.items()]
        lines += [f"- note: {note}" for note in bench.notes]
        heads = ["figure", "target", "min", "median", "max", "verdict", ""]
        lines += ["", *_table(heads, [figure.cells() for figure in self.figures]), ""]
        if self.result is not None:
            return "\n".join([*lines, "```", self.result.table(), "```"]) + "\n"
        lines += ["## Candidates", ""]
        lines += _table(
            ["candidate", "runs", "s min", "s median", "s max", "CPU s per GB", "GB/s", "peak rise MB"],
            [_candidate_cells(name, outcomes) for name, outcomes in self.outcomes.items()],
        )
        failures = {name: [o.error for o in outcomes if o.error] for name, outcomes in self.outcomes.items()}
        lines += ["", *(f"- {name} failed: {errors[-1]}" for name, errors in failures.items() if errors)]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, bench: Bench | Result, folder: Path) -> Path:
        """Write ``NAME-DATE.md`` and ``NAME-DATE.json`` into `folder`; the former's path."""
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / f"{self.name}-{datetime.date.today().isoformat()}.md"
        page.write_text(self.markdown(bench))
        data = {
            "name": self.name,
            "circumstances": self._circumstances(),
            "configuration": self.configuration,
            "notes": list(bench.notes),
            "figures": [
                dataclasses.asdict(figure) | {"values": list(figure.values), "verdict": figure.verdict}
                for figure in self.figures
            ],
            "outcomes": {name: [_sample(outcome) for outcome in outcomes] for name, outcomes in self.outcomes.items()},
        }
        if self.result is not None:
            data["result"] = json.loads(self.result.to_json())
        page.with_suffix(".json").write_text(json.dumps(data, indent=1, default=str) + "\n")
        return page

    def _circumstances(self) -> dict[str, str]:
        versions = {}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
        return {
            "processor": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
            "kernel": platform.release(),
            "huge pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            "python": platform.python_version(),
            "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
            "commit": commit(),
            "load average at start and end": f"{self._load_at_start:.2f}, {os.getloadavg()[0]:.2f}",
        }


def disk_of(path: Path) -> str:
    """The file system and block device that hold `path`."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            kind, source = after.split()[:2]
            queue = Path("/sys/dev/block") / number / "queue"
            scheduler = _chosen(str(queue / "scheduler"))
            return f"{kind} on {source}, scheduler {scheduler}"
    return f"device {number}"


def _sample(outcome: Outcome) -> dict[str, Any]:
    fields = dataclasses.asdict(outcome)
    del fields["modules"], fields["name"]
    return fields


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def _candidate_cells(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    good = [outcome for outcome in outcomes if outcome.error is None]
    results = [outcome.result for outcome in good if isinstance(outcome.result, dict)]
    seconds = [value for result in results for value in _as_list(result.get("seconds", []))]
    if not seconds:
        return [name, str(len(good)), "", "", "", "", "", ""]
    cells = [name, str(len(good)), *(f"{pick(seconds):.3f}" for pick in (min, statistics.median, max))]
    num_bytes = results[0].get("num_bytes", 0)
    cpu = [value for result in results for value in _as_list(result.get("cpu_seconds", []))]
    cells.append(f"{statistics.median(cpu) / (num_bytes / 1e9):.3f}" if cpu and num_bytes else "")
    cells.append(f"{num_bytes / statistics.median(seconds) / 1e9:.2f}" if num_bytes else "")
    cells.append(f"{max(outcome.peak_rise_bytes for outcome in good) / 1e6:.0f}")
    return cells


def _as_list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _chosen(file: str) -> str:
    """The bracketed word of a kernel setting such as ``always [madvise] never``."""
    try:
        return Path(file).read_text().partition("[")[2].partition("]")[0] or "unknown"
    except OSError:
        return "unknown"


def commit() -> str:
    """What git calls the working tree."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return "unknown"
    return answer.stdout.strip() or "none"
