"""Loads: each gives every weight of a checkpoint, in host memory, usable on the CPU. Called in a child process.

A load and one pass over every page of every weight is what is timed: a loader that only maps the file has not read it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["LOADERS", "load_and_touch"]

PAGE_BYTES = 4096

# What a loader returns: the weights by name, and our model, to ask for its plan (None for a peer).
Loaded = tuple[Iterable[tuple[str, Any]], Any]


def load_and_touch(loader: str, path: str) -> dict[str, Any]:
    """Load and touch every page.

    Args:
        loader: a key of LOADERS.
        path: the checkpoint's folder.

    Returns:
        ``seconds`` (load and pass), ``load_seconds`` (of it, until the load returned), ``cpu_seconds`` (all threads,
        user and system), ``num_bytes`` of weights, ``num_weights``, ``checksum`` (equal for equal weights),
        ``mapped_bytes`` (weights that are pages of the checkpoint's files), ``plan`` (what it says, ours only).
    """
    load = LOADERS[loader]
    start, start_cpu = time.perf_counter(), time.process_time()
    weights, keep = load(path)
    weights = list(weights)
    loaded = time.perf_counter()
    checksum = sum(_touch(weight) for _, weight in weights)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "seconds": seconds,
        "load_seconds": loaded - start,
        "cpu_seconds": cpu_seconds,
        "num_bytes": sum(weight.nbytes for _, weight in weights),
        "num_weights": len(weights),
        "checksum": checksum,
        "mapped_bytes": mapped_bytes(weights, path),
        "plan": plan_figures(keep),
    }


def mapped_bytes(weights: Iterable[tuple[str, Any]], path: str) -> int:
    """Bytes of the weights that lie in a map of a file of this folder, as the kernel lists it."""
    folder = str(Path(path).resolve())
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        columns = line.split(maxsplit=5)
        if len(columns) == 6 and columns[5].startswith(folder):
            begin, end = (int(address, 16) for address in columns[0].split("-"))
            areas.append((begin, end))
    return sum(weight.nbytes for _, weight in weights if any(begin <= weight.data_ptr() < end for begin, end in areas))


def plan_figures(model: Any) -> dict[str, Any] | None:
    """What our plan states for host memory, or None for a model that is not ours."""
    import bigmodel
    from bigmodel.errors import InvalidArgumentError

    if model is None:
        return None
    try:
        plan = bigmodel.plan_of(model)
    except InvalidArgumentError:
        return None
    return {
        "peak_bytes": plan.estimate.peak_bytes["cpu"],
        "resident_bytes": sum(place.weight_bytes for place in plan.placements if place.home == "cpu"),
        "streamed_bytes": sum(place.weight_bytes for place in plan.placements if place.home == "disk"),
        "resident_units": [place.unit for place in plan.placements if place.home == "cpu"],
    }


def _touch(weight: Any) -> int:
    """One element of each page, summed: exact, so that equal weights give equal sums in any order."""
    import torch

    flat = weight.detach().view(-1).view(torch.int16)
    return int(flat[:: PAGE_BYTES // 2].sum())


def _bigmodel(path: str) -> Loaded:
    import bigmodel

    model = bigmodel.load_sharded(path, device_map="cpu")
    return model.named_parameters(), model


def _bigmodel_private(path: str) -> Loaded:
    """With a stated limit: weights in memory of the process's own, which nobody evicts."""
    import bigmodel

    model = bigmodel.load_sharded(path, device_map="cpu", max_memory={"cpu": "64GiB"})
    return model.named_parameters(), model


def _transformers(device_map: str | None) -> Callable[[str], Loaded]:
    def load(path: str) -> Loaded:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=device_map)
        return model.named_parameters(), None

    return load


def _accelerate(path: str) -> Loaded:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model = load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})
    return model.named_parameters(), None


def _runai(path: str) -> Loaded:
    """The weights as a dict, without a model around them: in this peer's favour."""
    from runai_model_streamer import SafetensorsStreamer

    weights = {}
    with SafetensorsStreamer() as streamer:
        # Newer versions give the memory away; older ones hand out views of buffers that they use again.
        keeps = "owned" in inspect.signature(streamer.stream_files).parameters
        streamer.stream_files(_files(path))
        for name, tensor in streamer.get_tensors():
            weights[name] = tensor if keeps else tensor.clone()
    return weights.items(), None


def _safetensors(path: str) -> Loaded:
    from safetensors.torch import load_file

    weights = {}
    for file in _files(path):
        weights.update(load_file(file))
    return weights.items(), None


def _safetensors_copied(path: str) -> Loaded:
    """Private memory the plain way: a copy of each tensor that safetensors shows."""
    from safetensors import safe_open

    weights = {}
    for file in _files(path):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 -- it is no dict and has no iterator
                weights[name] = stream.get_tensor(name).clone()
    return weights.items(), None


def _files(path: str) -> list[str]:
    return [str(file) for file in sorted(Path(path).glob("*.safetensors"))]


LOADERS: dict[str, Callable[[str], Loaded]] = {
    "bigmodel": _bigmodel,
    "bigmodel, private": _bigmodel_private,
    "transformers": _transformers(None),
    "transformers, device_map='cpu'": _transformers("cpu"),
    "transformers, device_map='auto'": _transformers("auto"),
    "accelerate": _accelerate,
    "Run:ai streamer": _runai,
    "safetensors load_file": _safetensors,
    "safetensors, copied": _safetensors_copied,
}
