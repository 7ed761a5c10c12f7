"""A function of a notebook, in several processes that are started from inside the kernel."""

from __future__ import annotations

import linecache
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigmodel.errors import InvalidArgumentError, LaunchError
from bigmodel.launch.launcher import launch
from bigmodel.launch.settings import Detected, LaunchSettings

__all__ = ["notebook_launcher", "surroundings"]

# Set where TPUs are: their processes are XLA's to start.
_TPU = ("TPU_NAME", "COLAB_TPU_ADDR", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")


def notebook_launcher(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    *,
    num_restarts: int = 0,
    num_threads: int | None = None,
) -> list[Any]:
    """Call a function in processes that can talk to each other, from inside a notebook (Jupyter, Colab, Kaggle) or a script.

    The processes are new ones: the function, its arguments and what it uses of the notebook are pickled by value, so make models
    and move tensors to accelerators inside of it. What they write comes into the cell, each line with its rank.

    Args:
        fn: called as ``fn(*args)`` in each; a `TrainingRun` inside of it finds the others.
        args: of it; anything that can be pickled.
        num_processes: one for each accelerator, or one, if None.
        num_restarts: how often all are started again after one failed.
        num_threads: of operators, in each; a process's share of the processors if None.

    Returns:
        What each process returned, by rank.

    Raises:
        InvalidArgumentError: this process has initialised an accelerator, which the new ones need for themselves; or the function
            cannot be pickled.
        LaunchError: a process failed; which one first, and why. Its traceback is in the cell.
        KeyboardInterrupt: the cell was interrupted; no process is left.
    """
    if not callable(fn):
        raise InvalidArgumentError(f"fn is a {type(fn).__name__}. Give a function, and its arguments as args=(...).")
    if not isinstance(args, (tuple, list)):
        raise InvalidArgumentError(f"args is a {type(args).__name__}. Give a tuple, such as args=(1e-4,).")
    settings = LaunchSettings(num_processes=num_processes, num_restarts=num_restarts, num_threads=num_threads)
    where, environment = surroundings(), os.environ
    if any(environment.get(name) for name in _TPU) or environment.get("PJRT_DEVICE") == "TPU":
        raise InvalidArgumentError(
            f"{where} has a TPU here, and XLA is not supported. Choose a GPU, or no accelerator."
        )
    _refuse_initialised()
    detected = Detected.here()
    number = settings.where(detected).num_processes
    folder = Path(tempfile.mkdtemp(prefix="bigmodel-notebook-"))
    try:
        file = folder / "call"
        file.write_bytes(pickle.dumps({"path": sys.path, "sources": _sources(), "call": _pickled(fn, args)}))
        print(f"{number} process{'es' if number > 1 else ''} ({where}, {detected})", flush=True)
        try:
            launch(settings, str(file), kind="call", shows="lines", tell=_say)
        except LaunchError as error:
            raise LaunchError(str(error), exit_code=error.exit_code) from None  # one that shows no frames of ours
        return [pickle.loads((folder / f"returned-{rank}").read_bytes()) for rank in range(number)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def surroundings(modules: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Where this process runs: "Colab", "Kaggle", "Jupyter", "IPython" or "Python"."""
    modules = sys.modules if modules is None else modules
    environment = os.environ if environment is None else environment
    if "google.colab" in modules or "COLAB_RELEASE_TAG" in environment:
        return "Colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in environment:
        return "Kaggle"
    if "IPython" not in modules:
        return "Python"
    shell = modules["IPython"].get_ipython()
    if shell is None:
        return "Python"
    return "Jupyter" if "IPKernelApp" in getattr(shell, "config", {}) else "IPython"


def _refuse_initialised() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        held = [f"cuda:{index}" for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
        raise InvalidArgumentError(
            f"This process has initialised CUDA{' and holds memory of ' + ', '.join(held) if held else ''}, and new processes "
            "need the devices for themselves. Restart the kernel, and move models and tensors to devices inside of "
            "the function alone."
        )


def _pickled(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    try:
        import cloudpickle
    except ImportError as error:
        raise InvalidArgumentError(
            'Functions of a notebook are sent by cloudpickle, and it is not installed. Run pip install "bigmodel[training]".'
        ) from error
    try:
        found: bytes = cloudpickle.dumps((fn, tuple(args)))
    except Exception as error:  # whatever an object's own reduction raises
        raise InvalidArgumentError(
            f"{getattr(fn, '__name__', 'fn')}, its arguments, or something of the notebook that it uses cannot be sent to another"
            f" process: {' '.join(str(error).split())}. Make it inside of the function."
        ) from error
    return found


def _sources() -> dict[str, Any]:
    """Lines of cells, which are in no file: tracebacks show them."""
    cells = {name: entry for name, entry in linecache.cache.items() if not os.path.exists(name) and len(entry) == 4}
    return {
        name: (size, None, lines, name) for name, (size, _, lines, _) in cells.items()
    }  # None: no file to look at again


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
