"""Accelerators for machines that have none: real numbers on devices "sim:0", "sim:1", ... whose memory and links are simulated.

`backend.cpp` says what is real. It is compiled when it is first asked for (ten seconds; a C++ compiler must be there), and kept
in the user's cache folder under a key made of its text and torch's version.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["COMPILER", "IS_FRESH", "Counts", "counts", "passes_afresh", "seconds", "simulated"]

COMPILER = shutil.which("g++") or shutil.which("clang++")
_UNLIMITED = (1 << 63) - 1
_is_loaded = False
_FRESH = "BIGMODEL_TEST_AFRESH"
IS_FRESH = _FRESH in os.environ
"""Whether this is a process in which autograd has not run before these devices were there: it counts devices once."""


@dataclass(frozen=True)
class Counts:
    """What a device did since it was set up.

    Attributes:
        allocations, flushes: of its memory, and of its allocator's cache.
        synchronizations: of the host with it.
        operators: that it ran.
        used_bytes, peak_bytes: of its memory.
    """

    allocations: int
    synchronizations: int
    flushes: int
    operators: int
    used_bytes: int
    peak_bytes: int


def passes_afresh(file: str) -> None:
    """Assert that the tests of a file pass in a process of its own, where `IS_FRESH` is True."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", file]
    done = subprocess.run(
        command,
        env={**os.environ, _FRESH: "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@contextlib.contextmanager
def simulated(
    num_devices: int,
    *,
    memory_bytes: int | Sequence[int] = _UNLIMITED,
    link_bytes_per_s: float = 0.0,
    operator_s: float = 0.0,
    with_virtual_clock: bool = False,
    is_unified: bool = False,
) -> Iterator[None]:
    """So many devices while the block runs; none afterwards.

    Args:
        num_devices: up to 8.
        memory_bytes: of each, or of all alike.
        link_bytes_per_s: that copies between a device and the host, or another device, take; 0 for at once.
        operator_s: under the virtual clock, what each operator takes.
        is_unified: whether they say that their memory is the host's.
        with_virtual_clock: nothing sleeps, time is counted, and memory that is used without the event that it takes is an error.
    """
    _load()
    _Module.is_unified = is_unified
    limits = [memory_bytes] * num_devices if isinstance(memory_bytes, int) else list(memory_bytes)
    torch.ops.sim.configure(num_devices, with_virtual_clock)
    try:
        for device, limit in enumerate(limits):
            torch.ops.sim.set_device(device, limit, link_bytes_per_s, operator_s)
        yield
        # A copy ahead of its use is tried again when it fails: its error may have reached nobody.
        assert not torch.ops.sim.missing_events()
    finally:
        torch.ops.sim.configure(0, False)


def counts(device: int) -> Counts:
    """Of a device, since `simulated` was entered."""
    return Counts(*torch.ops.sim.counts(device))


def seconds(device: int) -> float:
    """That the device's work takes up to now, by the virtual clock."""
    found: float = torch.ops.sim.seconds(device)
    return found


class _Module:
    """What torch asks of a device's Python module, and what tells about a device."""

    is_unified = False

    @staticmethod
    def is_available() -> bool:
        return _Module.device_count() > 0

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return int(torch.ops.sim.device_count())

    @staticmethod
    def current_device() -> int:
        return int(torch.ops.sim.current_device())

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def get_device_properties(device: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(is_integrated=_Module.is_unified)

    @staticmethod
    def mem_get_info(device: int) -> tuple[int, int]:
        return torch.accelerator.get_memory_info(device)


def _load() -> None:
    global _is_loaded
    if not _is_loaded:
        torch.ops.load_library(str(_built()))
        torch.utils.rename_privateuse1_backend("sim")
        torch._register_device_module("sim", _Module())
        torch.utils.generate_methods_for_privateuse1_backend()
        _is_loaded = True


def _built() -> Path:
    source = Path(__file__).with_name("backend.cpp")
    version = f"{torch.__version__} {sys.version_info[:2]} {source.read_text()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigmodel" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"simulated-{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
    with (folder / "simulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in several processes
        if not library.exists():
            _compile(source, library)
    return library


def _compile(source: Path, library: Path) -> None:
    if COMPILER is None:
        raise RuntimeError("simulated accelerators need a C++ compiler: install g++")
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", abi, *includes, str(source), "-o", str(made)]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the simulated accelerators do not compile:\n{done.stderr[-4000:]}")
        made.rename(library)
