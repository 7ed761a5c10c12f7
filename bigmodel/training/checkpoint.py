"""A run on disk: logical tensors under the model's own names, whoever held which part, and a manifest that makes it complete.

```
FOLDER/
  manifest.json     version, run, step, cursor, names and shapes; written last
  state.pt          parameter groups, scheduler, registered objects: plain values
  random-RANK.pt    random generators of each process
  *.distcp, .metadata   torch.distributed.checkpoint: model.NAME, buffers.NAME, optimizer.NAME.KEY
```

It is made beside its place and put there whole, so that a kill at any moment leaves what was there before.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bigmodel.errors import InvalidArgumentError, TrainingError, join_some
from bigmodel.saving import sync
from bigmodel.training.collectives import mapped
from bigmodel.training.draws import random_states, restore_random
from bigmodel.training.folders import KIND, MANIFEST, VERSION, is_complete, put, read_manifest
from bigmodel.training.pieces import Pieces
from bigmodel.training.processes import Processes
from bigmodel.training.strategy import Engine, Stored, StoredState

__all__ = [
    "CALL_TIMEOUT",
    "begin_save",
    "load_state",
    "together",
]

logger = logging.getLogger("bigmodel.training")

CALL_TIMEOUT = timedelta(minutes=5)
"""All processes must have called save or load within this time of the first."""


def begin_save(
    folder: Path,
    engine: Engine,
    optimizer: Optimizer | None,
    manifest: Mapping[str, Any],
    others: Callable[[], Mapping[str, Any]],
    processes: Processes,
    *,
    hooks: Sequence[Callable[[Path], None]] = (),
    copies: bool,
) -> Callable[[Processes], None]:
    """Take what a checkpoint holds; every process calls it.

    Args:
        folder: replaced whole where it is a checkpoint.
        engine, optimizer: whose logical tensors are written.
        manifest: what JSON can hold.
        others: called when all processes have come; what ``torch.load(weights_only=True)`` can hold.
        processes: all of them.
        hooks: called in each process with the folder before it is put in its place.
        copies: whether tensors are copied, so that training may go on before they are written.

    Returns:
        What writes it, and puts it in its place; every process calls it once, with the processes as they are to talk: from a
        thread of its own, over a group of its own.

    Raises:
        InvalidArgumentError: the folder holds something else.
        TrainingError: not all processes came in time.
    """
    together(processes, "save")
    folder = folder.absolute()
    if folder.exists() and not is_complete(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidArgumentError(f"{folder} is no checkpoint of a training run. Give another folder to save into.")
    staging = folder.with_name(f".{folder.name}.saving")
    failed: BaseException | None = None
    if processes.is_main:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as error:
            failed = error
    processes.all_right(failed)
    state = _tensors(engine, optimizer)
    values = {"groups": _groups(engine, optimizer), **others()}
    draws = random_states(processes)
    shapes = {name: list(each.shape) for name, each in state["model"].items()}
    manifest = {**manifest, "optimizer": None if optimizer is None else type(optimizer).__name__}
    if copies:
        state, values = mapped(state, _copied), copy.deepcopy(values)

    def write(processes: Processes) -> None:
        error: BaseException | None = None
        try:
            for hook in hooks:
                hook(staging)
            if hooks and processes.is_main:
                _refuse_taken(staging)
        except Exception as caught:
            error = caught
        processes.all_right(error)
        alone, group = processes.size == 1, processes.host_group
        with _alone_is_right() if alone else contextlib.nullcontext():
            save_tensors(state, storage_writer=FileSystemWriter(staging), process_group=group, no_dist=alone)
        try:
            torch.save(draws, staging / f"random-{processes.rank}.pt")
        except Exception as caught:
            error = caught
        processes.all_right(error)
        if processes.is_main:
            try:
                _write_others(staging, values)
                written = {
                    "kind": KIND,
                    "version": VERSION,
                    "written_ns": time.time_ns(),
                    "num_processes": processes.size,
                }
                text = json.dumps({**written, **manifest, "shapes": shapes}, indent=1)
                (staging / MANIFEST).write_text(text + "\n", encoding="utf-8")
                for path in (*staging.rglob("*"), staging):
                    sync(path)
                put(staging, folder)
            except Exception as caught:
                error = caught
        processes.all_right(error)

    return write


def load_state(
    folder: Path,
    engine: Engine,
    optimizer: Optimizer | None,
    refuse: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
    processes: Processes,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint into a model and an optimizer, whatever engine and number of processes wrote it; every process calls it.

    Args:
        refuse: called with the manifest and the other values before anything is changed; raises where they do not fit.

    Returns:
        The manifest and the other values that were saved.

    Raises:
        MissingFilesError: there is no complete checkpoint.
        TrainingError: it is of another model or optimizer, and nothing was changed; or not all processes came in time.
    """
    together(processes, "load")
    masters = engine.saved()
    failed: BaseException | None = None
    try:
        manifest, others, groups = _read_plain(folder, masters, engine, optimizer)
        refuse(manifest, others)
    except Exception as error:
        failed = error
    processes.all_right(failed)  # nobody begins to read tensors that others do not
    reader = FileSystemReader(folder)
    stored_states = {} if optimizer is None else _stored_states(reader, masters)
    states = engine.blank_states(stored_states)
    with _alone_is_right():

        def read(what: Mapping[str, Any]) -> None:
            wanted = {kind: each for kind, each in what.items() if each}
            if wanted:
                load_tensors(wanted, storage_reader=reader, no_dist=processes.size == 1)

        ones = {
            name: {key: value for key, value in values.items() if stored_states[name][key].is_one}
            for name, values in states.items()
        }
        read({"optimizer": ones})
        engine.refuse_states(states)
        read({"model": masters, "buffers": _buffers(engine.module), "optimizer": states})
    engine.refreshed()
    if optimizer is not None:
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
        engine.put_states(optimizer, states)
    if manifest["num_processes"] == processes.size:
        restore_random(torch.load(folder / f"random-{processes.rank}.pt", weights_only=True), processes)
    processes.wait()
    return manifest, others


def _read_plain(
    folder: Path, masters: Mapping[str, torch.Tensor], engine: Engine, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The manifest, the other values, and the optimizer's groups, if they are of this model and optimizer."""
    manifest = read_manifest(folder)
    shapes = {name: list(each.shape) for name, each in masters.items()}
    stored = manifest["shapes"]
    different = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
    if different:
        raise TrainingError(
            f"{folder} is a checkpoint of another model: {len(different)} parameters differ in name or shape: "
            f"{join_some(different)}. Prepare the model that was saved."
        )
    others = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    groups = others.pop("groups")
    if optimizer is not None:
        kind, own = manifest.get("optimizer", type(optimizer).__name__), type(optimizer).__name__
        if kind != own:
            saved = "no optimizer" if kind is None else f"a {kind}"
            raise TrainingError(f"{folder} has {saved}, and this is a {own}. Build the optimizer that was saved.")
        _refuse_groups(folder, engine.groups(optimizer), groups)
    return manifest, others, groups


# --- Tensors


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a state dict holds."""
    found = {}
    for prefix, each in module.named_modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in each._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _tensors(engine: Engine, optimizer: Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": engine.saved(), "buffers": _buffers(engine.module)}
    if optimizer is not None:
        state["optimizer"] = engine.states(optimizer)
    return {kind: each for kind, each in state.items() if each}


def _copied(tensor: Any) -> torch.Tensor:
    """A logical tensor with a copy of this process's part, on the CPU where it is whole or in pieces."""
    if isinstance(tensor, Pieces):
        return Pieces(tensor.shape, tensor.start, tensor.flat.detach().to("cpu", copy=True))
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor.detach().clone()
        return DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    copied: torch.Tensor = tensor.detach().to("cpu", copy=True)
    return copied


def _stored_states(reader: FileSystemReader, masters: Mapping[str, torch.Tensor]) -> Stored:
    stored = reader.read_metadata().state_dict_metadata
    found: dict[str, dict[str, TensorStorageMetadata]] = {}
    ones = {"step"}  # a scalar parameter's other states have its step's shape
    for full, described in stored.items():
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        if full.startswith("optimizer.") and name in masters and isinstance(described, TensorStorageMetadata):
            found.setdefault(name, {})[key] = described
            if described.size != masters[name].shape:
                ones.add(key)
    return {
        name: {key: StoredState(each.size, each.properties.dtype, key in ones) for key, each in keys.items()}
        for name, keys in found.items()
    }


def _groups(engine: Engine, optimizer: Optimizer | None) -> list[dict[str, Any]]:
    if optimizer is None:
        return []
    named = zip(optimizer.param_groups, engine.groups(optimizer), strict=True)
    return [{**group, "params": names} for group, names in named]


def _refuse_groups(folder: Path, own: list[list[str]], saved: list[dict[str, Any]]) -> None:
    """TrainingError where an optimizer's groups hold other parameters than those that were saved."""
    if [sorted(each) for each in own] != [sorted(group["params"]) for group in saved]:
        raise TrainingError(
            f"The optimizer of {folder} has {len(saved)} parameter groups of {', '.join(str(len(g['params'])) for g in saved)} "
            f"parameters, and this one {len(own)} of {', '.join(map(str, map(len, own)))}, or others in them. Build the "
            "optimizer that was saved."
        )


# --- Processes and files


def _refuse_taken(folder: Path) -> None:
    """InvalidArgumentError where a hook wrote what a checkpoint has itself."""
    taken = [
        each.name
        for pattern in (MANIFEST, "state.pt", "random-*.pt", "*.distcp", ".metadata")
        for each in folder.glob(pattern)
    ]
    if taken:
        raise InvalidArgumentError(
            f"A hook wrote {join_some(sorted(taken))}, which a checkpoint has itself. Give its file another name."
        )


def _write_others(folder: Path, others: Mapping[str, Any]) -> None:
    """As `torch.load(weights_only=True)` will read it: tried now, when there is something to be done about it."""
    file = folder / "state.pt"
    torch.save(_plain(others), file)
    try:
        torch.load(file, weights_only=True)
    except Exception as error:
        raise TrainingError(
            f"The state of the scheduler, the optimizer's groups or a registered object cannot be saved: {error}. "
            "Let its state_dict hold numbers, strings, tensors, and lists and dicts of them."
        ) from error


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return value


def together(processes: Processes, what: str) -> None:
    if processes.size == 1:
        return
    try:
        processes.come(CALL_TIMEOUT)
    except RuntimeError as error:
        raise TrainingError(
            f"Not every process called run.{what} within {CALL_TIMEOUT}: {str(error).splitlines()[0]}. Call it on all of them, "
            "not under is_main_process."
        ) from error


@contextlib.contextmanager
def _alone_is_right() -> Iterator[None]:
    """Without torch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
