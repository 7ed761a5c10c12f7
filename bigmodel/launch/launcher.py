"""Starts processes by torch's elastic launcher, starts them again where that is asked for, and says which one failed and why."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigmodel.errors import InvalidArgumentError, LaunchError
from bigmodel.launch.child import pid_of
from bigmodel.launch.failures import Ended, first_of
from bigmodel.launch.settings import Detected, LaunchSettings, Where
from bigmodel.launch.slurm import num_unused

__all__ = ["launch"]

logger = logging.getLogger("bigmodel.launch")

_TORCH = "torch.distributed.elastic"
# Told by torch's own log when a process is seen to have failed, which starts all of them again.
_FAILED, _CLOSING = "failed (exitcode:", "Sending process %s closing signal"
# Sent on to the processes, which go on: what SLURM sends some time before the end of a job.
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# That the launcher of one machine waits for those of the others.
_MEETING_S = 900


def launch(
    settings: LaunchSettings,
    target: str,
    arguments: Sequence[str] = (),
    *,
    kind: str = "file",
    variables: Mapping[str, str] | None = None,
    shows: str = "terminal",
    tell: Callable[[str], None] | None = None,
) -> None:
    """Run a script in processes that can talk to each other, until all of them have ended.

    Each has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, as torchrun's have.
    The first process of a machine writes to this one's stdout and stderr; lines of the others come with their rank before them.

    Args:
        settings: what is asked for.
        target: a script, or what `kind` says.
        arguments: of the script.
        kind: "file", "module" (`target` is its name), or "call" (a file that `notebook` wrote).
        variables: further ones, for the environment of the processes.
        shows: what becomes of what processes write: "terminal", the first of this machine has this process's stdout and stderr,
            and lines of the others come with their ranks; "lines", those of all come so, through `sys.stdout` and
            `sys.stderr`; "nothing", it goes to the files of `settings.logs` alone.
        tell: called with what becomes of the processes, a line at a time; written to stderr if None.

    Raises:
        InvalidArgumentError: there is no such script, or the settings do not fit this machine.
        LaunchError: a process failed; which one first, and why. Or the machines did not meet.
        KeyboardInterrupt: this process was interrupted; what it had started has ended.
    """
    from torch.distributed.launcher.api import LaunchConfig

    say = tell or (lambda text: print(text, file=sys.stderr, flush=True))
    _refuse_missing(target, kind)
    where = settings.where(Detected.here())
    unused = num_unused(os.environ) if where.num_nodes == 1 else 0
    if unused:
        say(
            f"this SLURM job has {unused} machine{'s' if unused > 1 else ''} more, and uses this one alone: "
            "srun --ntasks-per-node=1 bigmodel launch ... starts a launcher on each"
        )
    if where.endpoint:
        say(f"{where.num_nodes} machines meet at {where.endpoint}, as {where.job!r}")
    kept = None if settings.logs is None else Path(settings.logs)
    folder = Path(tempfile.mkdtemp(prefix="bigmodel-launch-")) if kept is None else kept
    folder.mkdir(parents=True, exist_ok=True)
    attempts = _Attempts(folder, where, settings, say, shows=shows)
    config = LaunchConfig(
        min_nodes=where.num_nodes,
        max_nodes=where.num_nodes,
        nproc_per_node=where.num_processes,
        logs_specs=attempts.logs(),
        run_id=where.job,
        role="",
        rdzv_endpoint=where.endpoint or "localhost:0",
        rdzv_backend="c10d",
        rdzv_configs=_meeting(where),
        max_restarts=settings.num_restarts,
        # The role is empty: torch takes an empty prefix for none, and has a default.
        log_line_prefix_template="[rank ${rank}] " if where.num_nodes * where.num_processes > 1 else "${role_name}",
        # The name of a machine is not always one that it can be found by; alone, nobody else has to.
        local_addr="127.0.0.1" if where.num_nodes == 1 else None,
        shutdown_timeout=settings.grace_s,
        signals_to_handle="",
        numa_options=None,
    )
    command = ["-u", "-m", "bigmodel.launch.child", "bound" if settings.binds else "free"]
    command += [kind, target, *arguments]
    before = set(_children())
    # Torch sets the second one, and leaves it.
    own = {"OMP_NUM_THREADS": str(where.num_threads), "TORCHELASTIC_SIGNALS_TO_HANDLE": ""}
    if settings.num_restarts or where.num_nodes > 1:
        # Torch's launcher keeps one store for all attempts, and processes that are started again would read the addresses of
        # those that ended; without it each attempt's first process makes one.
        own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # files that torch's launcher leaves open
        try:
            with _variables({**(variables or {}), **own}), _signals(before), attempts.watched():
                problem = _carried_out(config, command, attempts, where)
        finally:
            _end(set(_children()) - before)
            gc.collect()
            if kept is None:
                shutil.rmtree(folder, ignore_errors=True)
    if problem is not None:
        raise problem


def _carried_out(config: Any, command: Sequence[str], attempts: _Attempts, where: Where) -> BaseException | None:
    """What went wrong: made here, raised where nothing of torch's launcher is held any more."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return LaunchError(attempts.verdict(error.failures), exit_code=attempts.exit_code)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            return KeyboardInterrupt()
        told = f"{error.sigval.name} was sent to the launcher, and to all processes"
        return LaunchError(told, exit_code=128 + error.sigval)
    except RendezvousError as error:
        told = " ".join(str(error).split())
        return LaunchError(
            f"{where.num_nodes} machines did not meet at {where.endpoint}: {told}. Start one launcher on each, with the same "
            "--nodes, --rdzv and --job, where that machine's port can be reached."
        )
    return None


class _Attempts:
    """What was started, and started again: where it writes, and what became of it."""

    def __init__(
        self, folder: Path, where: Where, settings: LaunchSettings, say: Callable[[str], None], *, shows: str
    ) -> None:
        self._folder, self._where, self._say, self._shows = folder, where, say, shows
        self._num_restarts, self._keeps = settings.num_restarts, settings.logs is not None
        self._num_killed = _num_out_of_memory()
        self._failed: tuple[int, int] | None = None  # local rank and exit code that torch saw first
        self._seen_s = 0.0
        self._closed: set[int] = set()  # processes that torch ended
        self._errors: dict[int, str] = {}
        self._records: dict[int, str] = {}
        self._ranks: dict[int, str] = {}
        self.exit_code = 1

    def logs(self) -> Any:
        """Where processes write; what goes to files is shown from there."""
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

        attempts = self

        class Logs(DefaultLogsSpecs):
            def reify(self, envs: dict[int, dict[str, str]]) -> Any:
                attempts.again(envs)
                found = super().reify(envs)
                attempts._errors, attempts._records = dict(found.stderrs), dict(found.error_files)
                return found

        if self._shows == "nothing":
            return Logs(log_dir=str(self._folder), redirects=Std.ALL)
        first = 0 if self._keeps or self._shows == "lines" else 1
        shown = dict.fromkeys(range(first, self._where.num_processes), Std.ALL)
        return Logs(log_dir=str(self._folder), tee=shown)

    def again(self, envs: Mapping[int, Mapping[str, str]]) -> None:
        """Called before processes are started; tells why, where they were before."""
        ranks, self._ranks = self._ranks, {local: each.get("RANK", str(local)) for local, each in envs.items()}
        number = int(envs[0].get("TORCHELASTIC_RESTART_COUNT", 0))
        if not number:
            return
        ended = self._by_themselves()
        if ended:
            first = first_of(ended)
            self._say(f"rank {ranks.get(first.rank, first.rank)} {self._told(first)}")
        self._say(f"starting again, {number} of {self._num_restarts}")
        self._failed, self._closed = None, set()

    def verdict(self, failures: Mapping[int, Any]) -> str:
        """Of the processes that ended last: which failed first, and why."""
        ended = []
        for rank, each in failures.items():
            ended.append(self._ended(each.local_rank, each.exitcode, float(each.timestamp), rank=rank))
        first = first_of(ended)
        code = first.exit_code or 1
        self.exit_code = code if 0 < code < 256 else 128 - code
        others = len(ended) - 1
        text = f"rank {first.rank} {self._told(first)}."
        if others:
            text += f" {others} other process{'es' if others > 1 else ''} of this machine ended with it."
        if self._num_restarts:
            text += f" It was started again {self._num_restarts} time{'s' if self._num_restarts > 1 else ''}."
        if self._keeps:
            text += f" What each wrote is in {self._folder}."
        return text

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While torch's launcher runs: what it logs is heard, and told in our words alone."""
        theirs = logging.getLogger(_TORCH)
        handler = _Heard(self._hear)
        handlers, propagates, level = list(theirs.handlers), theirs.propagate, theirs.level
        theirs.handlers, theirs.propagate = [handler], False
        theirs.setLevel(logging.WARNING)
        try:
            yield
        finally:
            theirs.handlers, theirs.propagate = handlers, propagates
            theirs.setLevel(level)

    def _hear(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith(_FAILED) and isinstance(record.args, tuple) and len(record.args) >= 2:
            code, local_rank = record.args[:2]
            if isinstance(code, int) and isinstance(local_rank, int):
                self._failed, self._seen_s = (local_rank, code), time.time()
        elif str(record.msg).startswith(_CLOSING) and isinstance(record.args, tuple) and record.args:
            self._closed.add(record.args[0])  # type: ignore[arg-type]
        logger.debug("torch: %s", record.getMessage())

    def _by_themselves(self) -> list[Ended]:
        """Processes that torch did not end, by their rank on this machine: torch tells the exit code of one."""
        found = []
        for local, file in self._records.items():
            failed = self._failed is not None and self._failed[0] == local
            if failed or Path(file).is_file():
                found.append(self._ended(local, self._failed[1] if failed and self._failed else None, self._seen_s))
            elif (pid := pid_of(file)) is not None and pid not in self._closed:
                found.append(self._ended(local, None, self._seen_s))
        return found

    def _ended(self, local_rank: int, exit_code: int | None, at_s: float, *, rank: int | None = None) -> Ended:
        why, trace, at = _read(self._records.get(local_rank, ""))
        errors = self._errors.get(local_rank)
        return Ended(
            rank=local_rank if rank is None else rank,
            exit_code=exit_code,
            at_s=at or at_s,
            why=why,
            trace=trace,
            errors=Path(errors) if errors and Path(errors).is_file() else None,
        )

    def _told(self, ended: Ended) -> str:
        return ended.told(is_out_of_memory=_num_out_of_memory() > self._num_killed)


class _Heard(logging.Handler):
    def __init__(self, hear: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self._hear(record)


def _read(file: str) -> tuple[str, str, float]:
    """Why, the traceback, and when, as the process left them."""
    try:
        message = json.loads(Path(file).read_text(encoding="utf-8"))["message"]
        if isinstance(message, str):
            return message, "", 0.0
        extra = message.get("extraInfo", {})
        at = extra["time_ns"] / 1e9 if "time_ns" in extra else float(extra.get("timestamp", 0))
        return str(message.get("message", "")), str(extra.get("py_callstack", "")), at
    except (OSError, ValueError, KeyError, TypeError):
        return "", "", 0.0


def _refuse_missing(target: str, kind: str) -> None:
    if kind == "module":
        try:
            found = importlib.util.find_spec(target) is not None
        except (ImportError, ValueError):
            found = False
        if not found and not (Path.cwd() / target.replace(".", "/")).with_suffix(".py").is_file():
            raise InvalidArgumentError(f"There is no module {target!r}. Give its name as Python's -m takes it.")
    elif not Path(target).exists():
        raise InvalidArgumentError(
            f"There is no script {target!r}. Give a Python file, or --module and a module's name."
        )


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signals(others: set[int]) -> Iterator[None]:
    """What signals do meanwhile; afterwards all is as it was.

    The first that ends a process is torch's launcher's, which sends it on and waits; a second one does not wait: torch's own
    handlers would begin the waiting anew.

    Args:
        others: processes that were there before.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    def own() -> set[int]:
        return set(_children()) - others

    def pass_on(number: int, frame: Any) -> None:
        for pid in own():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)

    is_ending = False

    def end(number: int, frame: Any) -> None:
        nonlocal is_ending
        if is_ending:
            _end(own())
            return
        is_ending = True
        raise SignalException(f"signal {number}", signal.Signals(number))

    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread, which alone sets them
        for signals, handler in ((_PASSED_ON, pass_on), (_ENDING, end)):
            for each in signals:
                before[each] = signal.signal(each, handler)
    try:
        yield
    finally:
        for each, was in before.items():
            signal.signal(each, was)


def _meeting(where: Where) -> dict[str, Any]:
    """Settings of torch's rendezvous."""
    waits = dict.fromkeys(("timeout", "join_timeout", "read_timeout"), _MEETING_S)
    return waits if where.is_host is None else {**waits, "is_host": where.is_host}


def _children() -> list[int]:
    """Processes that this one started and has not seen the end of; each leads a group of its own."""
    found: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return [pid for pid in found if _leads(pid)]


def _leads(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _end(pids: set[int]) -> None:
    """What a second signal, or an error, left running."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _num_out_of_memory() -> int:
    """Processes that the system has killed for lack of memory since it began."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
