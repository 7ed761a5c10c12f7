"""Trials: one measurement in one fresh process, under the same conditions for every candidate.

::

    parent                          child (in its cgroup)
      fill the balloon
      start ------------------------> import what the run will import
      drop or fill the page cache <-- "ready"; its memory now is the baseline
      release the balloon
      go ---------------------------> run, and time itself
      sample its memory             <-- "told", for whoever waits
      read the result <-------------- result
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bigmodel.bench.balloon import Balloon, available_bytes
from bigmodel.bench.cgroup import CgroupNotAllowed, MemoryCgroup
from bigmodel.bench.child import MARK
from bigmodel.bench.page_cache import cached_bytes, drop_from_cache, read_into_cache
from bigmodel.device_map.explanation import format_seconds
from bigmodel.footprint import PeakFootprint, footprint_bytes
from bigmodel.units import format_bytes

__all__ = ["Bench", "Outcome", "Trial"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is run, and under which conditions.

    Attributes:
        name: the candidate, as the report names it.
        call: ``"package.module:function"``; it takes `arguments` and returns something that JSON can say.
        arguments: keyword arguments.
        files: whose page cache counts.
        is_cold: True drops `files` from the page cache before the run, False reads them into it.
        environment: variables on top of this process's own.
        limit_bytes: of the memory cgroup; None runs outside one.
        modules: what the child imports before it says that it is ready.
        names_modules: whether the outcome lists all modules that the run imported.
        balloon_bytes: touched memory that is released before the run, where that should be less than the balloon.
    """

    name: str
    call: str
    arguments: Mapping[str, Any]
    files: Sequence[Path] = ()
    is_cold: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    limit_bytes: int | None = None
    modules: Sequence[str] = ()
    names_modules: bool = False
    balloon_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a trial.

    Attributes:
        name: the trial's.
        result: what the function returned; None where it failed.
        error: why it failed; None where it did not.
        baseline_bytes: anonymous and shared memory when everything was imported.
        peak_rise_bytes: the most above it that was seen until the result came.
        cgroup_peak_bytes: what the cgroup was charged at most, page cache included; None outside one.
        modules: see Trial.names_modules.
    """

    name: str
    result: Any
    error: str | None
    baseline_bytes: int
    peak_rise_bytes: int
    cgroup_peak_bytes: int | None
    modules: tuple[str, ...] = ()


class Bench:
    """Runs trials one after another, holding the balloon between them.

    Args:
        balloon_bytes: touched memory that is released before each run; 0 for none.
        timeout_s: a trial that takes longer is ended and counts as failed.
        tell: called with each outcome and remark, a line each; they go to stderr if None.

    Attributes:
        notes: remarks for the report.
        has_groups: whether control groups could be made, as far as any was asked for.
        was_interrupted: whether the rounds were ended before their time.
    """

    def __init__(
        self, *, balloon_bytes: int, timeout_s: float = 900.0, tell: Callable[[str], None] | None = None
    ) -> None:
        self.timeout_s = timeout_s
        self.tell = tell or _print
        self.notes: list[str] = []
        self.has_groups = True  # unless one could not be made
        self.was_interrupted = False
        self._balloon = Balloon(balloon_bytes)
        if self._balloon.num_bytes < balloon_bytes * 0.99 - (2 << 20):  # it holds whole huge pages
            self.note(
                f"the balloon holds {self._balloon.num_bytes / 1e9:.1f} GB of the {balloon_bytes / 1e9:.1f} GB wanted: "
                "less memory is free. Candidates that touch more may pay for host faults."
            )

    def __enter__(self) -> Bench:
        # An ended benchmark leaves no cgroup, no scratch folder and no process behind.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        return self

    def __exit__(self, *exception: object) -> None:
        self._balloon.close()

    def note(self, text: str) -> None:
        """Keep a remark for the report, once, and show it."""
        if text not in self.notes:
            self.notes.append(text)
            self.tell(f"note: {text}")

    def interleaved(self, trials: Sequence[Trial], num_rounds: int) -> dict[str, list[Outcome]]:
        """Run every trial `num_rounds` times, A B C A B C; one that failed twice in a row is not tried again.

        Returns:
            The outcomes by trial name, one per round, failures among them. After Ctrl-C or SIGTERM, those of the rounds
            that are whole; in the first round it is raised.
        """
        outcomes: dict[str, list[Outcome]] = {trial.name: [] for trial in trials}
        began_s = time.monotonic()
        for number in range(num_rounds):
            try:
                self._round(trials, outcomes, f"round {number + 1}/{num_rounds}")
            except (KeyboardInterrupt, SystemExit):  # the latter from SIGTERM
                if not number:
                    raise
                self.was_interrupted = True
                self.note(f"interrupted: {number} of {num_rounds} rounds")
                return {name: past[:number] for name, past in outcomes.items()}
            left_s = (time.monotonic() - began_s) / (number + 1) * (num_rounds - number - 1)
            if left_s >= _WORTH_TELLING_S:
                self.tell(f"{num_rounds - number - 1} more rounds: about {format_seconds(left_s)}")
        return outcomes

    def _round(self, trials: Sequence[Trial], outcomes: Mapping[str, list[Outcome]], title: str) -> None:
        for trial in trials:
            past = outcomes[trial.name]
            if len(past) >= 2 and past[-1].error is not None and past[-2].error is not None:
                continue
            past.append(self.run(trial))
            self.tell(f"{title}  {_summary(past[-1])}")

    def with_modules(self, trial: Trial, arguments: Mapping[str, Any]) -> Trial:
        """The trial, importing beforehand all that its run imports, as a run with other (small) arguments shows.

        No load is timed with an import inside, wherever the library has put it, and nothing but imports is left out.
        """
        outcome = self.run(
            dataclasses.replace(trial, arguments=arguments, files=(), limit_bytes=None, names_modules=True)
        )
        if outcome.error is not None:
            self.note(f"{trial.name}: a trial run failed: {outcome.error}")
        return dataclasses.replace(trial, modules=outcome.modules)

    def run(self, trial: Trial) -> Outcome:
        """One measurement."""
        if trial.limit_bytes is not None:
            try:
                with MemoryCgroup(trial.limit_bytes) as cgroup:
                    if cgroup.may_swap:
                        self.note("the kernel does not limit swap here: memory beyond the limit may have gone there.")
                    return self._run(trial, cgroup)
            except CgroupNotAllowed as error:
                self.has_groups = False
                self.note(f"no memory cgroup, the limit of {trial.limit_bytes >> 20} MiB does not hold: {error}.")
        return self._run(trial, None)

    def _run(self, trial: Trial, cgroup: MemoryCgroup | None) -> Outcome:
        self._balloon.fill(trial.balloon_bytes)
        argv = [sys.executable, "-m", "bigmodel.bench.child"]
        with (
            tempfile.TemporaryFile("w+") as errors,
            _process(
                cgroup.command(argv) if cgroup else argv,
                _environment() | dict(trial.environment),
                errors,
                self.timeout_s,
            ) as process,
        ):
            setup = {
                "call": trial.call,
                "arguments": dict(trial.arguments),
                "modules": list(trial.modules),
                "names_modules": trial.names_modules,
            }
            _tell(process, json.dumps(setup))
            words, baseline_bytes, peak_bytes, still_cached, not_cached = _hear(process, self.tell), 0, 0, 0, 0
            if words is not None and "ready" in words:
                if trial.is_cold:
                    still_cached = drop_from_cache(trial.files)
                else:
                    if not _have_room(trial.files):
                        self._balloon.release()
                    read_into_cache(trial.files)
                    not_cached = sum(file.stat().st_size for file in trial.files) - cached_bytes(trial.files)
                baseline_bytes = footprint_bytes(process.pid)
                self._balloon.release()
                with PeakFootprint(process.pid) as sampler:
                    _tell(process, "go")
                    words = _hear(process, self.tell)
                peak_bytes = sampler.peak_bytes
            process.wait()
            failure = _failure(words, process.returncode, cgroup, errors)
        num_bytes = sum(file.stat().st_size for file in trial.files)
        if not_cached > num_bytes // 20 and failure is None:
            failure = f"not warm: {format_bytes(not_cached)} of the files did not stay in the page cache"
        if still_cached > num_bytes // 1000 and failure is None:
            failure = (
                f"not cold: {format_bytes(still_cached)} of the files stayed in memory: another process has them mapped, or they "
                "lie in a file system that is memory (tmpfs)"
            )
        return Outcome(
            name=trial.name,
            result=None if failure or words is None else words["result"],
            error=failure,
            baseline_bytes=baseline_bytes,
            peak_rise_bytes=max(0, peak_bytes - baseline_bytes),
            cgroup_peak_bytes=cgroup.peak_bytes if cgroup else None,
            modules=tuple(words.get("modules", ())) if words else (),
        )


_WORTH_TELLING_S = 30.0
# Of memory, beside the files and the balloon, while both are held.
_SPARE_BYTES = 2 << 30


def _have_room(files: Sequence[Path]) -> bool:
    """Whether the page cache can take these files while the balloon is held."""
    needed = sum(file.stat().st_size for file in files) + _SPARE_BYTES
    return needed < available_bytes()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _environment() -> dict[str, str]:
    """This process's, and all that it can import can be imported."""
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}


@contextlib.contextmanager
def _process(
    argv: list[str], environment: dict[str, str], errors: IO[str], timeout_s: float
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # what it starts ends with it
    )

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def end() -> None:
        errors.write(f"\nended after {timeout_s:.0f} s without a result")
        kill()

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        kill()
        process.communicate()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is gone; the next word that is not heard says so
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _hear(process: subprocess.Popen[str], tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The next marked line but those that are for whoever waits; None when the process has ended without one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            words: dict[str, Any] = json.loads(line[len(MARK) :])
            if "told" not in words:
                return words
            tell(words["told"])
    return None


def _failure(words: dict[str, Any] | None, returncode: int, cgroup: MemoryCgroup | None, errors: IO[str]) -> str | None:
    if words is not None and "result" in words:
        return None
    if words is not None and "error" in words:
        return str(words["error"])
    if cgroup is not None and cgroup.num_oom_kills:
        return f"killed at the memory limit of {cgroup.limit_bytes >> 20} MiB"
    errors.seek(0)
    last = errors.read().strip().splitlines()[-1:] or ["nothing on stderr"]
    return f"ended with status {returncode}: {last[0][:300]}"


def _summary(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"{outcome.name}: FAILED: {outcome.error}"
    seconds = outcome.result.get("seconds") if isinstance(outcome.result, dict) else None
    times = [] if seconds is None else seconds if isinstance(seconds, list) else [seconds]
    told = f"{' '.join(f'{time:.3f}' for time in times)} s, " if times else ""
    if (
        not times and isinstance(outcome.result, dict) and "load_s" in outcome.result
    ):  # first tokens, and no step after it
        told = f"loaded in {outcome.result['load_s']:.3f} s, "
    return f"{outcome.name}: {told}{outcome.peak_rise_bytes / 1e6:.0f} MB"
