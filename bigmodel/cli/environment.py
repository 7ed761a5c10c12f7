"""Versions and hardware of this process, as a bug report needs them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import bigmodel
from bigmodel.units import format_bytes

if TYPE_CHECKING:
    from bigmodel.device_map.machine import Machine

__all__ = ["describe_environment", "describe_rates"]

PACKAGES = (
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "numpy",
    "accelerate",
    "peft",
    "diffusers",
    "deepspeed",
)
# They change what is loaded, from where, or how fast.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "THP_MEM_ALLOC_ENABLE",
)


def describe_environment() -> dict[str, str]:
    """What to copy into a report: name -> value, in a fixed order."""
    import torch

    from bigmodel.device_map.machine import Machine

    facts = {"bigmodel": bigmodel.__version__, "python": platform.python_version()}
    facts |= {name: version for name in PACKAGES if (version := _version(name)) is not None}
    facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts["processor"] = f"{_processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
    machine = Machine.probe()
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    unstated = format_bytes(machine.unstated_limit_bytes("cpu"))
    facts["processors"] = (
        f"{machine.num_processors} usable of {os.cpu_count()}, {torch.get_num_threads()} torch threads"
    )
    facts["memory"] = (
        f"{format_bytes(machine.host_bytes)} free of {format_bytes(total_bytes)}, {unstated} used unless stated"
    )
    facts["disk"] = f"{format_bytes(machine.disk_bytes)} free"
    facts["rates"] = machine.rates_from
    for accelerator in machine.accelerators:
        facts[accelerator.device] = f"{accelerator.name}, {format_bytes(accelerator.memory_bytes)} free"
    facts["huge pages"] = _read_line("/sys/kernel/mm/transparent_hugepage/enabled") or "unknown"
    facts["variables"] = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none"
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown processor"


def describe_rates(machine: Machine) -> dict[str, str]:
    """The rates that plans for a machine are made with: name -> value."""
    from bigmodel.device_map.rates import COPIED

    facts = {"rates": machine.rates_from, "disk": _per_s(machine.disk_read_bytes_per_s)}
    for name, rates in (
        ("host", machine.host_rates),
        *((each.device, each.rates) for each in machine.accelerators),
    ):
        facts[f"{name} memory"] = _per_s(rates.memory_bytes_per_s)
        for dtype, curve in rates.products.items():
            if dtype.endswith(COPIED):  # one shape alone has it
                continue
            least, most = curve[0][1], max(rate for _, rate in curve)
            facts[f"{name} {dtype}"] = f"{most / 1e9:.4g} GFLOP/s at best, {least / 1e9:.3g} at one token"
        facts[f"{name} operator"] = f"{rates.op_s * 1e6:.3g} us"
    for each in machine.accelerators:
        facts[f"link to {each.device}"] = _per_s(each.h2d_bytes_per_s)
    return facts


def _per_s(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _read_line(path: str) -> str:
    return _read(path).partition("\n")[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
