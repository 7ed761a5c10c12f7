"""What is measured of a checkpoint, and in which order: rates, plans, then rounds of everything in turn."""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.bench.harness import Bench, Outcome, Trial
from bigmodel.bench.peers import PEERS
from bigmodel.bench.result import Case, Measured, Result
from bigmodel.errors import BenchmarkError, BigModelError, DoesNotFitError, InvalidArgumentError, reason
from bigmodel.units import format_bytes

__all__ = ["Settings", "measure"]

_READERS = (1, 2, 4)
_BLOCK_BYTES, _RING_BYTES = 8 << 20, 512 << 20
# Of the disk's reference: a whole step of most models, and seconds of the others.
_MOST_READ_BYTES = 8 << 30
# A run that takes longer is ended: some minutes, and its passes from a slow disk.
_TIMEOUT_S, _SLOWEST_BYTES_PER_S = 900.0, 200e6
_SUBJECT, _PEER = "bigmodel.bench.subject", "bigmodel.bench.peers.running"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        path: the checkpoint, as `load_sharded` takes it.
        folder, files: where it is, and its weight files.
        load: of `load_sharded`, in words that JSON has.
        cases: the first is also that of loads and peers.
        num_rounds: runs of each.
        ram_bytes: of the control group around each run; None for none.
        peers: keys of PEERS.
        prompt: token ids of all prompts; None for made-up ones.
        guesses: "lookup", "draft" or both.
        draft: the checkpoint of the model that guesses.
        guessed_tokens: that are generated with guesses, and without.
        records: whether a run notes when everything happened, for `Result.page`.
        scratch: a folder for what peers write, kept; None for one beside the checkpoint that is removed.
        machine: its rates, where they were measured a moment ago; None measures them.
        environment: versions and hardware, for the result.
        tell: called with what happens, a line each.
    """

    path: str
    folder: Path
    files: tuple[Path, ...]
    load: Mapping[str, Any]
    cases: tuple[Case, ...]
    tell: Callable[[str], None]
    num_rounds: int = 5
    ram_bytes: int | None = None
    peers: tuple[str, ...] = ()
    prompt: tuple[int, ...] | None = None
    guesses: tuple[str, ...] = ()
    draft: str | None = None
    guessed_tokens: int = 64
    records: bool = False
    scratch: Path | None = None
    machine: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def measure(settings: Settings) -> Result:
    """Measure; takes minutes.

    Raises:
        InvalidArgumentError: there is too little disk for what peers write.
        DoesNotFitError: the first case does not fit.
        BenchmarkError: it could not be planned or run; the message says why.
    """
    num_bytes = sum(file.stat().st_size for file in settings.files)
    balloon_bytes = min(num_bytes, settings.ram_bytes or num_bytes) * 12 // 10
    num_passes = 2 * settings.guessed_tokens if settings.guesses else 16
    timeout_s = _TIMEOUT_S + num_passes * num_bytes / _SLOWEST_BYTES_PER_S
    with (
        _scratch(settings, num_bytes) as scratch,
        Bench(balloon_bytes=balloon_bytes, timeout_s=timeout_s, tell=settings.tell) as bench,
    ):
        run = _Run(settings, bench, scratch)
        if settings.ram_bytes is not None:  # told before a minute of measuring
            run.once("Python's libraries", f"{_SUBJECT}:import_libraries", {}, in_group=True)
        machine = settings.machine
        if machine is None:
            settings.tell("measuring this machine's rates: half a minute where it is idle, minutes where it is not")
            machine = run.once("rates", f"{_SUBJECT}:measure_rates", {"folder": str(settings.folder)})
        looked = run.look()
        cases = []
        for case, found in zip(settings.cases, looked, strict=True):
            if "error" in found:
                bench.note(f"{case.title} are left out: {found['error']}")
            else:
                size = found["plan"]["workload"]["batch_size"]
                workload = dataclasses.replace(case.workload, batch_size=size)
                foreseen = {name: found[name] for name in ("planning_s", "stall_s")}
                cases.append(dataclasses.replace(case, workload=workload, **foreseen))
        if "error" in looked[0]:  # of the case that loads and peers are measured with
            raise _refusal(looked[0])
        return run.rounds(_distinct(cases), machine)


class _Run:
    """One benchmark under way."""

    def __init__(self, settings: Settings, bench: Bench, scratch: Path) -> None:
        self._settings, self._bench, self._scratch = settings, bench, scratch
        self._limits: dict[str, int] = {}

    def once(self, name: str, call: str, arguments: Mapping[str, Any], *, in_group: bool = False) -> Any:
        """What a function returns in a process of its own."""
        limit = self._settings.ram_bytes if in_group else None
        outcome = self._bench.run(Trial(name=name, call=call, arguments=arguments, limit_bytes=limit, balloon_bytes=0))
        if outcome.error is None:
            return outcome.result
        if limit:
            raise BenchmarkError(
                f"In {format_bytes(limit)} {name} could not be had: {outcome.error}. Python and its libraries alone take about "
                "400 MiB: give more with --ram."
            )
        raise BenchmarkError(f"{name}: {outcome.error}.")

    def look(self) -> list[dict[str, Any]]:
        """What is planned for each case, or why it is not; from then on the limits are stated."""
        settings = self._settings
        arguments = {
            "path": settings.path,
            "load": settings.load,
            "cases": [dataclasses.asdict(case.workload) for case in settings.cases],
            "ram_bytes": settings.ram_bytes,
        }
        found = self.once("a plan", f"{_SUBJECT}:look", arguments, in_group=True)
        self._limits = found["limits"]
        cases: list[dict[str, Any]] = found["cases"]
        return cases

    def rounds(self, cases: Sequence[Case], machine: Mapping[str, Any]) -> Result:
        settings, bench = self._settings, self._bench
        base = self._rehearsed(self._ours(cases[0], cases[0].title), {"num_tokens": 2})
        if base.error is not None:
            raise BenchmarkError(f"{cases[0].title}: {base.error}")
        modules, prompt = base.modules, base.result["prompt"]
        trials = [self._disk(count, base.result["ranges"]) for count in _READERS]
        warm = self._ours(dataclasses.replace(cases[0], num_tokens=1), WARM, is_cold=False)
        trials += [warm, *(self._ours(case, case.title) for case in cases)]
        trials = [dataclasses.replace(trial, modules=modules) for trial in trials]
        trials += [dataclasses.replace(self._guesses(name), modules=modules) for name in settings.guesses]
        left_out: dict[str, str] = {}
        for title in (title for name in settings.peers for title in PEERS[name]):
            trial = self._peer(title, prompt, cases[0].num_tokens, left_out)
            if trial is not None:
                trials.append(trial)
        outcomes = bench.interleaved(trials, settings.num_rounds)
        recorded = self._recorded(cases[0]) if settings.records and not bench.was_interrupted else None
        return Result(
            path=settings.path,
            num_bytes=sum(file.stat().st_size for file in settings.files),
            ram_bytes=settings.ram_bytes if bench.has_groups else None,
            limits=self._limits,
            machine=dict(machine),
            cases=tuple(
                Measured.of(case, outcomes[case.title], outcomes[WARM] if not number else ())
                for number, case in enumerate(cases)
            ),
            disk={count: _read_rates(outcomes[_disk_title(count)]) for count in _READERS},
            guesses={name: tuple(map(_sample, outcomes[_GUESSES[name]])) for name in settings.guesses},
            peers={title: tuple(map(_sample, outcomes[title])) for title in outcomes if title in _TITLES},
            left_out=left_out,
            recorded=recorded,
            was_interrupted=bench.was_interrupted,
            notes=(*bench.notes, *_silent(outcomes)),
            environment=settings.environment,
        )

    def _ours(self, case: Case, name: str, *, is_cold: bool = True) -> Trial:
        settings = self._settings
        return Trial(
            name=name,
            call=f"{_SUBJECT}:run_model",
            arguments={
                "path": settings.path,
                "load": {**settings.load, "max_memory": self._limits or None},
                "workload": dataclasses.asdict(case.workload),
                "num_tokens": case.num_tokens,
                "prompt": settings.prompt,
            },
            files=settings.files,
            is_cold=is_cold,
            limit_bytes=settings.ram_bytes,
        )

    def _recorded(self, case: Case) -> Any:
        trial = self._ours(case, "recording")
        arguments = {name: trial.arguments[name] for name in ("path", "load", "workload", "prompt")}
        self._settings.tell("recording")
        outcome = self._bench.run(dataclasses.replace(trial, call=f"{_SUBJECT}:run_recorded", arguments=arguments))
        if outcome.error is not None:
            self._bench.note(f"the timeline could not be recorded: {outcome.error}")
        return outcome.result

    def _guesses(self, name: str) -> Trial:
        settings = self._settings
        prompt = settings.prompt
        return Trial(
            name=_GUESSES[name],
            call=f"{_SUBJECT}:run_guesses",
            arguments={
                "path": settings.path,
                "load": {**settings.load, "max_memory": self._limits or None},
                "draft": settings.draft if name == "draft" else None,
                "prompt": prompt,
                "prompt_tokens": settings.cases[0].workload.prompt_tokens if prompt is None else len(prompt),
                "new_tokens": settings.guessed_tokens,
            },
            files=settings.files,
            limit_bytes=settings.ram_bytes,
        )

    def _rehearsed(self, trial: Trial, arguments: Mapping[str, Any]) -> Outcome:
        """A short run, whose imports are known afterwards."""
        self._settings.tell(f"rehearsing {trial.name}")
        short = dict(trial.arguments) | dict(arguments)
        return self._bench.run(dataclasses.replace(trial, arguments=short, names_modules=True))

    def _disk(self, count: int, ranges: Sequence[Sequence[Any]]) -> Trial:
        """Reads of what a step reads; of the files, where it reads nothing."""
        wanted = [tuple(each) for each in ranges] or [
            (str(file), 0, file.stat().st_size) for file in self._settings.files
        ]
        chosen, total = [], 0
        for file, offset, size in wanted:
            size = min(size, _MOST_READ_BYTES - total) // 4096 * 4096
            if size:
                chosen.append((file, offset, size))
                total += size
        return Trial(
            name=_disk_title(count),
            call="bigmodel.bench.raw_read:read_into_ring",
            arguments={
                "ranges": chosen,
                "num_threads": count,
                "block_bytes": _BLOCK_BYTES,
                "ring_bytes": _RING_BYTES,
                "num_passes": 2,
            },
            files=self._settings.files,
        )

    def _peer(self, title: str, prompt: Sequence[int], num_tokens: int, left_out: dict[str, str]) -> Trial | None:
        """Its trial, when all that it needs is written and it has been rehearsed; None, and why, where it does not run."""
        settings = self._settings
        self._settings.tell(f"preparing {title}")
        try:
            place = {"peer": title, "path": str(settings.folder), "scratch": str(self._scratch)}
            prepared = self.once(title, f"{_PEER}:prepare_peer", {**place, "num_positions": len(prompt) + num_tokens})
        except BenchmarkError as error:
            left_out[title] = str(error).removeprefix(f"{title}: ").rstrip(".")
            settings.tell(f"{title} is left out: {left_out[title]}")
            return None
        trial = Trial(
            name=title,
            call=f"{_PEER}:run_peer",
            arguments={
                **place,
                "prompt": list(prompt),
                "num_tokens": num_tokens,
                "limits": self._limits or None,
            },
            files=[Path(file) for file in prepared["files"]],
            limit_bytes=settings.ram_bytes,
            environment=prepared["environment"],
        )
        rehearsal = self._rehearsed(trial, {"num_tokens": 2})
        if rehearsal.error is not None:
            left_out[title] = rehearsal.error
            settings.tell(f"{title} is left out: {rehearsal.error}")
            return None
        return dataclasses.replace(trial, modules=rehearsal.modules)


WARM = "load, warm"
_GUESSES = {"lookup": "guesses from the text", "draft": "guesses of a draft"}
_TITLES = {title for titles in PEERS.values() for title in titles}


def _refusal(found: Mapping[str, Any]) -> BigModelError:
    """Why no case could be planned, as the first was refused."""
    if found["tier"] is None:
        return BenchmarkError(found["error"])
    sizes = {name: found[name] for name in ("tier", "needed_bytes", "available_bytes")}
    return DoesNotFitError(found["error"], **sizes)


def _distinct(cases: Sequence[Case]) -> list[Case]:
    """Without those that came to be what an earlier one is."""
    seen: list[Case] = []
    for case in cases:
        if not any(case.workload == other.workload and case.num_tokens <= other.num_tokens for other in seen):
            seen.append(case)
    return seen


def _disk_title(count: int) -> str:
    return f"disk, {count} readers" if count > 1 else "disk, 1 reader"


def _read_rates(outcomes: Sequence[Outcome]) -> tuple[float, ...]:
    """Bytes/s of each round, over all of its passes; 0 where a run failed."""
    return tuple(
        0.0 if each.error is not None else each.result["num_bytes"] / statistics.mean(each.result["seconds"])
        for each in outcomes
    )


def _silent(outcomes: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    """What failed and has no row that says so."""
    for name in (WARM, *map(_disk_title, _READERS)):
        errors = [each.error for each in outcomes[name] if each.error is not None]
        if errors:
            yield f"{name} failed in {len(errors)} of {len(outcomes[name])} rounds: {errors[-1]}"


def _sample(outcome: Outcome) -> dict[str, Any]:
    """A run as data."""
    peaks = {"peak_bytes": outcome.peak_rise_bytes, "group_peak_bytes": outcome.cgroup_peak_bytes}
    return {"error": outcome.error} if outcome.error is not None else {**outcome.result, **peaks}


@contextmanager
def _scratch(settings: Settings, num_bytes: int) -> Iterator[Path]:
    """A folder for what peers write, on the checkpoint's disk."""
    num_written = sum(_copies(name) for name in settings.peers)
    place = settings.scratch or settings.folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        raise InvalidArgumentError(
            f"{place} cannot be written: {reason(error)}. Give another folder with --scratch."
        ) from error
    if settings.peers and not os.access(place, os.W_OK):
        raise InvalidArgumentError(
            f"The peers' files would go to {place}, which cannot be written. Give a folder on the same disk with --scratch."
        )
    if num_written * num_bytes > free_bytes:
        raise InvalidArgumentError(
            f"What the peers write takes about {format_bytes(num_written * num_bytes)}, and {place} has "
            f"{format_bytes(free_bytes)} free. Compare with fewer of them, or give another folder with --scratch."
        )
    if settings.scratch is not None or not settings.peers:
        yield place
        return
    made = Path(tempfile.mkdtemp(prefix=".bigmodel-bench-", dir=place))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _copies(peer: str) -> int:
    """Of the weights that a peer writes."""
    return {"llama.cpp": 2, "transformers": 0}.get(peer, 1)
