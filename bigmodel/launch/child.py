"""What each process of a launch begins as: bound to its processors, and telling the launcher why it failed, if it does.

``python -m bigmodel.launch.child BOUND KIND TARGET ARGUMENTS``: BOUND is "bound" or "free", KIND "file", "module" or "call".
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import io
import json
import linecache
import os
import pickle
import runpy
import sys
import time
import traceback
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path

from bigmodel.launch.binding import bind

__all__ = ["main", "pid_of"]


def main() -> None:
    """Run the target as Python would; the process ends with its status."""
    bound, kind, target, *arguments = sys.argv[1:]
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(f"{file}.pid").write_text(str(os.getpid()))
    if bound == "bound":
        bind(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    with contextlib.suppress(Exception):  # a stderr that is no file
        faulthandler.enable()
    sys.argv = [target, *arguments]
    try:
        if kind == "module":
            sys.path[0] = os.getcwd()
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        elif kind == "call":
            _call(Path(target))
        else:
            _run_file(target)
    except SystemExit as ended:
        if ended.code not in (None, 0):
            _note(f"it ended with status {ended.code}" if isinstance(ended.code, int) else str(ended.code), "")
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        _note(_told(error), "".join(traceback.format_exception(type(error), error, trace)))
        # As Python does with what nobody caught; what runs at exit knows by it that there was an error.
        error.__traceback__ = trace
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exception(error)  # which knows lines that are in no file
        else:
            sys.excepthook(type(error), error, trace)
        sys.exit(1)


def pid_of(error_file: str) -> int | None:
    """Of the process that would leave its reason in a file; None where it did not begin."""
    try:
        return int(Path(f"{error_file}.pid").read_text())
    except (OSError, ValueError):
        return None


def _run_file(target: str) -> None:
    """A script, as the module that pickles of it and processes that it starts look for."""
    path = Path(target)
    sys.path[0] = str(path.resolve().parent)
    if path.is_dir() or path.suffix in (".zip", ".pyz"):
        runpy.run_path(target, run_name="__main__")
        return
    module = types.ModuleType("__main__")
    module.__file__ = target
    module.__loader__ = SourceFileLoader("__main__", target)
    module.__dict__["__builtins__"] = builtins
    with io.open_code(os.path.abspath(target)) as file:
        code = compile(file.read(), target, "exec", dont_inherit=True)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _call(file: Path) -> None:
    """A function that was pickled, with what it needs; what it returns is left beside it, under this process's rank."""
    called = pickle.loads(file.read_bytes())
    sys.path[:] = called["path"]
    linecache.cache.update(called["sources"])
    function, args = pickle.loads(called["call"])
    value = function(*args)
    result = file.with_name(f"returned-{os.environ['RANK']}")
    try:
        result.write_bytes(pickle.dumps(value))
    except Exception as error:  # whatever its own reduction raises
        raise TypeError(
            f"What {getattr(function, '__name__', 'the function')} returns, a {type(value).__name__}, cannot be sent back: "
            f"{error}. Return numbers, text or tensors on the CPU."
        ) from None


def _is_ours(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen ") or filename == runpy.__file__


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _note(why: str, trace: str) -> None:
    """Leave the reason where the launcher looks for it, in the form of torch's own handler, and when to the nanosecond."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    now = time.time_ns()
    extra = {"py_callstack": trace, "timestamp": str(now // 10**9), "time_ns": now}
    with contextlib.suppress(OSError):
        part = Path(f"{file}.part")  # torch's launcher fails over half a file
        part.write_text(json.dumps({"message": {"message": why, "extraInfo": extra}}), encoding="utf-8")
        part.replace(file)


if __name__ == "__main__":
    main()
