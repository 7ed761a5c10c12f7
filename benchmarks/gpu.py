"""A model larger than an accelerator's memory, on a real one: link, steps, first tokens, peaks, and the peers in the same memory.

``python -m benchmarks.gpu``; needs no network. It ends before its deadline; what is left goes into another call, with the same
``--out`` and ``--only``: checkpoints, rates and outcomes are kept there. benchmarks/README.md says what is held equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_checkpoints
from benchmarks.gpu_figures import add_figures
from benchmarks.gpu_peers import PEERS, is_installed
from benchmarks.report import ROOT, Report, commit, disk_of
from bigmodel.bench.harness import Bench, Outcome, Trial
from bigmodel.bench.raw_read import widened

__all__ = ["PARTS", "Session"]

GIB = 1 << 30
# In the order of their weight, should the deadline come first.
PARTS = ("checkpoints", "links", "decode", "peers", "prompts", "profile", "bits", "batches", "disk", "bloom")
CHECKPOINTS = {"small": {"bits", "disk"}, "bloom": {"bloom"}}
CHECKPOINTS["llama"] = set(PARTS) - {"checkpoints", "links", "bits", "disk", "bloom"}
# bigmodel counts this much of an accelerator for its context: small models need it and a part of their own size.
CONTEXT_BYTES, LEAST_SHARE = 768 << 20, 0.3
BLOOM_SHARE = 0.6  # two of its layers are more than half of so few
# A trial is not begun with less time than this.
LEAST_S = 15.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens, steps and batches."""

    prompt_tokens: int = 128
    num_steps: int = 6
    prompts: tuple[int, ...] = (512, 2048, 8192)
    batches: tuple[int | str, ...] = (8, 64, "auto")


QUICK = Lengths(prompt_tokens=16, num_steps=2, prompts=(32, 64), batches=("auto",))


def main() -> None:
    arguments = _parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Bench(balloon_bytes=0, timeout_s=arguments.timeout) as bench:
        session = Session(bench, arguments)
        try:
            session.begin()
            for part in PARTS:
                if part in session.parts:
                    getattr(session, part)()
                    session.write()
        finally:
            session.write()
            print(session.report.markdown(bench))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "bm_gpu"
    parser.add_argument("--out", type=Path, default=default, help="folder for checkpoints, rates and outcomes")
    parser.add_argument("--only", choices=PARTS, action="append", default=[], help="run these parts; may be repeated")
    parser.add_argument("--gib", type=float, help="most of a model; by default what disk and memory allow")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the model that the accelerator may hold: 0.4 to 0.6"
    )
    parser.add_argument("--rounds", type=int, help="of the decode steps, ours and the peers' (default: 2)")
    parser.add_argument(
        "--deadline", type=float, help="seconds after which what is left is skipped (default: 450, with --quick 110)"
    )
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds that one trial may take")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, nothing written: does it run?")
    parser.add_argument("--simulated", action="store_true", help="on a simulated accelerator: does it run?")
    parser.add_argument("--results", type=Path, help="folder for the result files (default: benchmarks/results)")
    arguments = parser.parse_args()
    if not 0.4 <= arguments.share <= 0.6:
        parser.error(f"--share is {arguments.share}. Give 0.4 to 0.6.")
    if arguments.deadline is None:
        arguments.deadline = 110.0 if arguments.quick else 450.0
    if arguments.results is None and not arguments.quick:
        arguments.results = ROOT / "benchmarks" / "results"
    return arguments


class Session:
    """One call of the script: its trials, and what it and earlier calls with the same settings found.

    Args:
        bench: runs the trials.
        arguments: the command line.

    Attributes:
        parts: what is run.
        report: of all that was found so far.
    """

    def __init__(self, bench: Bench, arguments: argparse.Namespace) -> None:
        self._begun_s = time.monotonic()
        self._bench, self._arguments = bench, arguments
        self._lengths = QUICK if arguments.quick else Lengths()
        self.parts = set(arguments.only or PARTS)
        self._kind = "quick-" if arguments.quick else ""
        self._sizes = self._planned_sizes()
        name = f"gpu{'-quick' * arguments.quick}{'-simulated' * arguments.simulated}"
        self.report = Report(name, {})
        self._log = _Log(arguments.out / f"{name}.jsonl", arguments.results, [commit(), arguments.share, arguments.gib])
        self._memory = {"free_bytes": 0, "total_bytes": 0}

    # --- Parts

    def begin(self) -> None:
        """Look at the machine, make the checkpoints that the parts take, and measure the rates that plans rest on."""
        looked = self._run("accelerator", "benchmarks.gpu_runs:look", {})
        if looked is None or looked.error is not None:
            raise SystemExit(f"{looked.error if looked else 'The deadline leaves no time'}. Nothing was measured.")
        self._memory = looked.result
        print(f"{looked.result['device']}, {looked.result['free_bytes'] / GIB:.1f} GiB free", file=sys.stderr)
        wanted = {
            name: size
            for name, size in self._sizes.items()
            if {"checkpoints", *CHECKPOINTS[name.removeprefix(self._kind)]} & self.parts
        }
        # The tiny ones at once, and whatever is run: one of them stands for two.
        for sizes in [self._sizes] if self._arguments.quick else [{name: wanted[name]} for name in wanted]:
            arguments = {"out": str(self._arguments.out), "sizes": sizes}
            self._run(f"checkpoint {', '.join(sizes)}", "benchmarks.gpu_checkpoints:make", arguments, simulates=False)
        if self.parts - {"checkpoints", "profile", "bits"}:
            folder = str(self._path("small" if self._is_there("small") else "llama"))
            for trial, call, arguments in (
                ("calibrate", "calibrate", {"folder": folder}),
                ("link", "measure_link", {}),
            ):
                # A minute of measuring is not what --quick is for; rates are defaults then.
                is_left_out = trial == "calibrate" and self._arguments.quick and self._arguments.only != ["links"]
                if not is_left_out and ("links" in self.parts or trial not in self._log.found()):
                    self._run(trial, f"benchmarks.gpu_runs:{call}", arguments)

    def checkpoints(self) -> None:
        """They are made already."""

    def links(self) -> None:
        """Measured already."""

    def decode(self) -> None:
        """Steps of one sequence, together with the peers where they run too; and of the model whole on the accelerator."""
        rounds = 1 if self._arguments.quick else self._arguments.rounds or 2
        peers = list(self._peers()) if "peers" in self.parts else []
        failed = set()
        for number in range(rounds):
            ours = self._bigmodel("bigmodel", "llama", round=number)
            if ours is None or ours.error is not None:
                break
            # Others take longer than all else: once is enough to be held against.
            for name, call, arguments in peers if number == 0 or self._arguments.rounds else ():
                if name not in failed:
                    outcome = self._run(name, f"benchmarks.gpu_peers:{call}", arguments, round=number)
                    failed |= {name} if outcome is None or outcome.error is not None else set()
        batches = [1, *(each for each in self._lengths.batches if isinstance(each, int))]
        self._resident("resident", "llama", batches)

    def peers(self) -> None:
        """With `decode`, round by round."""
        if "decode" not in self.parts:
            self.decode()

    def prompts(self) -> None:
        arguments = {**self._budget("llama"), "lengths": list(self._lengths.prompts)}
        self._run("bigmodel, prompts", "benchmarks.gpu_runs:run_prompts", arguments)

    def profile(self) -> None:
        self._run("profile", "benchmarks.gpu_runs:profile_step", self._budget("llama"))

    def bits(self) -> None:
        arguments = {**self._budget("small"), "prompt_tokens": self._lengths.prompt_tokens}
        self._run("equal bits", "benchmarks.gpu_runs:same_bits", arguments)

    def batches(self) -> None:
        for size in self._lengths.batches:
            name = "bigmodel, best batch" if size == "auto" else f"bigmodel, batch {size}"
            self._bigmodel(name, "llama", batch_size=size)

    def disk(self) -> None:
        """A small model whose weights all rest on disk, from files that no cache holds; the disk's own rate beside it."""
        where = disk_of(self._arguments.out)
        if where.startswith(("tmpfs", "ramfs")):
            self._bench.note(f"disk: skipped, {self._arguments.out} is on {where.split()[0]}: it has no O_DIRECT")
            return
        path = self._path("small")
        cold = {"is_cold": True, "files": gpu_checkpoints.files_of(path)}
        for threads in (4, 8) if not self._arguments.quick else (4,):
            ranges = widened((str(file), 0, file.stat().st_size) for file in gpu_checkpoints.files_of(path))
            arguments = {"ranges": ranges, "num_threads": threads, "block_bytes": 8 << 20}
            arguments |= {"ring_bytes": 512 << 20, "num_passes": 2}
            self._run(
                f"disk, {threads} threads", "bigmodel.bench.raw_read:read_into_ring", arguments, simulates=False, **cold
            )
        self._bigmodel("bigmodel, everything on disk", "small", num_steps=3, device_map={"": "disk"}, **cold)
        if is_installed("deepspeed"):
            folder = self._arguments.out / "nvme"
            folder.mkdir(exist_ok=True)
            arguments = self._steps("small") | {"num_steps": 3, "nvme_path": str(folder), "live_layers": 4}
            self._run("deepspeed, from disk", "benchmarks.gpu_peers:run_deepspeed", arguments, **cold)
            shutil.rmtree(folder, ignore_errors=True)

    def bloom(self) -> None:
        self._bigmodel("bigmodel, bloom-shaped", "bloom")
        if not self._arguments.quick:
            self._resident("resident, bloom-shaped", "bloom", [1])

    # --- What they are made of

    def write(self) -> None:
        """Bring the report up to what was found, and write it where results are wanted."""
        report = self.report
        report.configuration = self._configuration()
        report.figures, report.outcomes = [], self._log.outcomes()
        add_figures(report, self._log.found(), with_peers=bool(self.parts & {"peers"}) or self._log.has(PEERS))
        if self._arguments.results is not None:
            page = report.write(self._bench, self._arguments.results)
            print(f"written: {page}", file=sys.stderr, flush=True)

    def _configuration(self) -> dict[str, str]:
        lines = {
            "accelerator": f"{self._memory.get('device')}, {self._memory['free_bytes'] / GIB:.1f} GiB free",
            "checkpoints on": disk_of(self._arguments.out),
            "deadline": f"{self._arguments.deadline:.0f} s; this call took {time.monotonic() - self._begun_s:.0f} s",
        }
        for name in ("llama", "bloom", "small"):
            if self._is_there(name):
                size, budget = gpu_checkpoints.bytes_of(self._path(name)), self._budget(name)["budget"]
                config = json.loads((self._path(name) / "config.json").read_text())
                layers = config.get("num_hidden_layers") or config.get("n_layer")
                lines[f"checkpoint {name}"] = (
                    f"{size / 1e9:.2f} GB bf16, {layers} layers, hidden {config['hidden_size']}; the accelerator may hold "
                    f"{budget / 1e9:.2f} GB, {100 * budget / size:.0f}% of it"
                )
        return lines

    def _planned_sizes(self) -> dict[str, int]:
        out = self._arguments.out
        there = sum(
            file.stat().st_size for file in out.rglob("*.safetensors")
        )  # counts as free: it is not written again
        host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        host = max(host, _available_bytes())
        sizes = gpu_checkpoints.sizes(shutil.disk_usage(out).free + there, host, is_quick=self._arguments.quick)
        most = int((self._arguments.gib or 1 << 20) * GIB)
        return {name: min(size, most) for name, size in sizes.items()}

    def _path(self, name: str) -> Path:
        name = "quick-llama" if self._arguments.quick and name == "small" else f"{self._kind}{name}"
        return Path(self._arguments.out) / name

    def _is_there(self, name: str) -> bool:
        return (self._path(name) / "config.json").exists()

    def _budget(self, name: str) -> dict[str, Any]:
        """The checkpoint, and what the accelerator may hold: a share of this model's bytes, and no more than is free."""
        size = gpu_checkpoints.bytes_of(self._path(name))
        share = BLOOM_SHARE if name == "bloom" else self._arguments.share
        budget = max(int(share * size), CONTEXT_BYTES + int(LEAST_SHARE * size))
        return {"path": str(self._path(name)), "budget": min(budget, self._memory["free_bytes"])}

    def _steps(self, name: str) -> dict[str, Any]:
        tokens, steps = self._lengths.prompt_tokens, self._lengths.num_steps
        return {**self._budget(name), "prompt_tokens": tokens, "num_steps": steps}

    def _bigmodel(self, trial: str, name: str, *, round: int = 0, **options: Any) -> Outcome | None:
        conditions = {key: options.pop(key) for key in ("is_cold", "files") if key in options}
        return self._run(
            trial, "benchmarks.gpu_runs:run_bigmodel", self._steps(name) | options, round=round, **conditions
        )

    def _resident(self, trial: str, name: str, batch_sizes: Sequence[int]) -> None:
        size = gpu_checkpoints.bytes_of(self._path(name))
        if 1.1 * size + 8 * GIB > self._memory["free_bytes"]:
            self._bench.note(f"{trial}: skipped, the whole model does not fit on the accelerator: stalls are not told")
            return
        arguments = self._steps(name) | {"batch_sizes": list(batch_sizes)}
        del arguments["budget"]
        self._run(trial, "benchmarks.gpu_runs:run_resident", arguments)

    def _peers(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        steps = self._steps("llama")
        for peer in filter(is_installed, PEERS):
            yield peer, f"run_{peer}", steps
            if peer == "deepspeed":
                yield "deepspeed, 4 layers live", "run_deepspeed", steps | {"live_layers": 4}

    def _run(
        self,
        name: str,
        call: str,
        arguments: Mapping[str, Any],
        *,
        round: int = 0,
        simulates: bool = True,
        is_cold: bool = False,
        files: Sequence[Path] = (),
    ) -> Outcome | None:
        """One trial, whose outcome is written at once; None where the deadline does not allow it."""
        left = self._arguments.deadline - (time.monotonic() - self._begun_s)
        if left < LEAST_S:
            self._bench.note(f"{name}: skipped, the deadline of {self._arguments.deadline:.0f} s is near")
            return None
        if simulates:
            arguments = dict(arguments) | {"simulates": self._arguments.simulated}
        trial = Trial(
            name=name,
            call=call,
            arguments=arguments,
            files=files,
            is_cold=is_cold,
            # What is measured of the machine is kept beside the checkpoints, and is nobody else's.
            environment={"XDG_CACHE_HOME": str(self._arguments.out.resolve() / "cache")},
        )
        self._bench.timeout_s = min(self._arguments.timeout, left)
        begun = time.monotonic()
        try:
            outcome = self._bench.run(trial)
        except Exception as error:  # of the harness itself: the other trials run all the same
            outcome = Outcome(
                name=name, result=None, error=repr(error), baseline_bytes=0, peak_rise_bytes=0, cgroup_peak_bytes=None
            )
        said = outcome.error or "ran"
        print(f"{name}: {said} ({time.monotonic() - begun:.1f} s)", file=sys.stderr, flush=True)
        self._log.append(outcome, round)
        return outcome


class _Log:
    """Outcomes, one to a line, in the folder of the checkpoints, and beside the results.

    Args:
        file: where they are kept between calls.
        results: folder where a copy grows; None for none.
        settings: outcomes with other ones are left out.
    """

    def __init__(self, file: Path, results: Path | None, settings: list[Any]) -> None:
        self._settings = settings
        self._files = [file]
        lines = file.read_text().splitlines() if file.exists() else []
        self._entries = [entry for entry in map(_parsed_line, lines) if entry and entry["settings"] == settings]
        self._call = 1 + max((entry["call"] for entry in self._entries), default=0)
        if results is not None:
            results.mkdir(parents=True, exist_ok=True)
            copy = results / f"{file.stem}-{datetime.date.today().isoformat()}.jsonl"
            if not copy.exists():
                copy.write_text("".join(json.dumps(entry) + "\n" for entry in self._entries))
            self._files.append(copy)

    def append(self, outcome: Outcome, round: int) -> None:
        entry = {"settings": self._settings, "call": self._call, "round": round, "outcome": dataclasses.asdict(outcome)}
        self._entries.append(entry)
        for file in self._files:
            with file.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
                os.fsync(stream.fileno())

    def outcomes(self) -> dict[str, list[Outcome]]:
        """By trial."""
        found: dict[str, list[Outcome]] = {}
        for entry in self._entries:
            fields = entry["outcome"] | {"modules": ()}
            found.setdefault(fields["name"], []).append(Outcome(**fields))
        return found

    def found(self) -> dict[str, dict[tuple[int, int], dict[str, Any]]]:
        """Trial -> (call, round) -> what it returned, of those that worked."""
        found: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
        for entry in self._entries:
            outcome = entry["outcome"]
            if outcome["error"] is None:
                found.setdefault(outcome["name"], {})[entry["call"], entry["round"]] = outcome["result"]
        return found

    def has(self, names: Mapping[str, str]) -> bool:
        return any(entry["outcome"]["name"].partition(",")[0] in names for entry in self._entries)


def _parsed_line(line: str) -> dict[str, Any] | None:
    """None for a line that was cut off."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
