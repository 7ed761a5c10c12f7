"""Saving a model as safetensors files, tensor by tensor: what is in memory is one tensor, never the model."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.checkpoint.header import encode_header
from bigmodel.errors import DoesNotFitError, InvalidArgumentError, SavingError, join_some
from bigmodel.offload.resting import files_in_use
from bigmodel.offload.spill import trim_heap
from bigmodel.progress import Report
from bigmodel.units import format_bytes, parse_bytes

__all__ = ["save", "save_beside", "sync"]

_WRITE_BYTES = 16 << 20  # one write; the figures of the progress bar move this often
_TRIM_BYTES = 1 << 20  # after a tensor of this size memory goes back to the system
_SPARE_BYTES = 1 << 20  # of disk, for headers, index and configuration

Revert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    *,
    revert: Revert | None = None,
    generation_config: Any = None,
    progress: Report | None = None,
) -> list[Path]:
    """Write a model's weights and configuration to a folder, from which `from_pretrained` and `load_sharded` read it.

    What `bigmodel.save` does, with what it needs to know of transformers and of streaming handed in.

    Args:
        model, folder, max_shard_size: as there.
        revert: from the model's state dict to the one whose names and layout the architecture's checkpoints have; it is
            given a few tensors at a time. None: the model's own names.
        generation_config: written in place of the model's own; None for that.
        progress: called with ``"saving"``, bytes written and bytes in total.
    """
    limit_bytes = max(1, parse_bytes(max_shard_size, "max_shard_size"))
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise InvalidArgumentError(f"{target} is a file. Give a folder to save into.")
    _refuse_adapters(model)
    entries, aliases = _entries(model)
    if revert is not None:
        entries, aliases = _reverted(entries, revert), {}
    base = _base_name(model)
    files = _split(entries, limit_bytes, base)
    stale = _weight_files(target, base) - files.keys()
    _refuse_files_in_use([target / name for name in (*files, *stale)])

    with _staged(target) as staging:
        _refuse_too_large(target, entries)
        _write_configuration(model, staging, generation_config)
        _write_weights(files, staging, {"format": "pt", **aliases}, progress)
        if len(files) > 1:
            _write_index(files, staging / f"{base}.safetensors.index.json")
        others = sorted(path.name for path in staging.iterdir() if path.name not in files)
        for name in (*files, *others):
            os.replace(staging / name, target / name)
        for name in stale - set(others):
            (target / name).unlink()
        sync(target)
    return [target / name for name in (*files, *others)]


def save_beside(folder: Path, file: str, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> list[Path]:
    """Write tensors to one safetensors file of a folder, and texts beside it; each is put in its place whole.

    Args:
        folder: made if it is not there.
        file: its name.
        tensors: name -> contiguous values.
        texts: name of a file -> what it holds.

    Raises:
        InvalidArgumentError: the folder is a file.
        DoesNotFitError: the disk has no room.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is a file. Give a folder to save into.")
    entries = [_Entry(name, each.dtype, tuple(each.shape), each) for name, each in tensors.items()]
    with _staged(folder) as staging:
        _refuse_too_large(folder, entries)
        _write_weights({file: entries}, staging, {"format": "pt"}, None)
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
            sync(staging / name)
        for name in (file, *texts):
            os.replace(staging / name, folder / name)
        sync(folder)
    return [folder / name for name in (file, *texts)]


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder inside the target, to be left empty; where that fails, nothing of it stays."""
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target, prefix=".saving-"))
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if made and not any(target.iterdir()):
            target.rmdir()
        raise
    staging.rmdir()


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Tensors of the model that are reverted together, because some result needs more than one of them."""

    inputs: Mapping[str, torch.Tensor]
    revert: Revert


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor to write: the model's own, or what the reversal of a group gives under this name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    origin: torch.Tensor | _Group

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _entries(model: nn.Module) -> tuple[list[_Entry], dict[str, str]]:
    """The tensors of the state dict, each once, and the other names of those that are tied."""
    entries: list[_Entry] = []
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    wrong: list[str] = []
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, value in model.state_dict(keep_vars=True).items():
        if name in ignored:
            continue
        if not isinstance(value, torch.Tensor):
            wrong.append(f"{name} (a {type(value).__name__})")
        elif value.device.type == "meta":
            wrong.append(f"{name} (on meta: it has no bytes)")
        elif value.layout != torch.strided:
            wrong.append(f"{name} ({value.layout})")
        elif id(value) in first_name:
            aliases[name] = first_name[id(value)]
        else:
            first_name[id(value)] = name
            entries.append(_Entry(name, value.dtype, tuple(value.shape), value))
    if wrong:
        raise InvalidArgumentError(
            f"{len(wrong)} entries of the model's state cannot be saved as tensors: {join_some(wrong)}. Load or "
            "initialise them, or remove them, first."
        )
    return entries, aliases


def _reverted(entries: Sequence[_Entry], revert: Revert) -> list[_Entry]:
    """The same weights as `revert` names and shapes them, found out on meta, in groups as small as they can be."""
    tensors = {entry.name: entry.origin for entry in entries if isinstance(entry.origin, torch.Tensor)}
    meta = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}
    results = revert(dict(meta))
    own_name = {id(tensor): name for name, tensor in meta.items()}
    origins: dict[str, torch.Tensor | _Group] = {
        name: tensors[own_name[id(value)]] for name, value in results.items() if id(value) in own_name
    }
    kept = {id(value) for value in results.values()}
    unused = [name for name, tensor in meta.items() if id(tensor) not in kept]

    def try_group(names: Sequence[str]) -> bool:
        """Take these as a group, if alone they give just what they give among all."""
        try:
            alone = revert({name: meta[name] for name in names})
        except Exception:  # whatever a converter raises when a tensor that it needs is not there
            return False
        if not alone or any(name in origins or not _same(results.get(name), value) for name, value in alone.items()):
            return False
        group = _Group({name: tensors[name] for name in names}, revert)
        origins.update(dict.fromkeys(alone, group))
        return True

    left = [name for name in unused if not try_group([name])]
    blocks: dict[str, list[str]] = {}
    for name in left:
        match = re.match(r"((?:.*?\.)?\d+)(\.|$)", name)  # up to the first number: usually one layer
        blocks.setdefault(match[1] if match else "", []).append(name)
    left = [name for names in blocks.values() if not try_group(names) for name in names]
    if (left and not try_group(left)) or origins.keys() != results.keys():
        raise SavingError(
            f"{len(results.keys() - origins.keys())} of {len(results)} weights could not be given the names of the "
            f"architecture's checkpoints a few at a time. Save the model's own names, or use save_pretrained."
        )
    # A group's results stand together, so that it is reverted once.
    order = {id(origin): index for index, origin in enumerate(origins.values())}
    names = sorted(results, key=lambda name: order[id(origins[name])])
    return [_Entry(name, results[name].dtype, tuple(results[name].shape), origins[name]) for name in names]


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and one.dtype == other.dtype


def _split(entries: Sequence[_Entry], limit_bytes: int, base: str) -> dict[str, list[_Entry]]:
    """File name -> what goes into it, in the model's order as far as alignment allows."""
    parts: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.nbytes > limit_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.nbytes
    for part in parts:  # wide dtypes first: then each tensor starts at an offset that its dtype can view
        part.sort(key=lambda entry: -entry.dtype.itemsize)
    if len(parts) == 1:
        return {f"{base}.safetensors": parts[0]}
    return {f"{base}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def _base_name(model: nn.Module) -> str:
    """What weight files are called; diffusers, whose models save their config themselves, looks for its own name."""
    return "diffusion_pytorch_model" if callable(getattr(model, "save_config", None)) else "model"


def _weight_files(folder: Path, base: str) -> set[str]:
    """Names of the safetensors files and the index of an earlier save."""
    pattern = re.compile(rf"{base}(-\d{{5}}-of-\d{{5}})?\.safetensors|{base}\.safetensors\.index\.json")
    return {path.name for path in folder.iterdir() if pattern.fullmatch(path.name)} if folder.is_dir() else set()


def _write_weights(
    files: Mapping[str, Sequence[_Entry]], folder: Path, metadata: Mapping[str, str], progress: Report | None
) -> None:
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    done = 0
    for name, entries in files.items():
        with open(folder / name, "xb", buffering=0) as file:
            _write(file.fileno(), memoryview(encode_header(((e.name, e.dtype, e.shape) for e in entries), metadata)))
            for data in _contents(entries):
                size = len(data)
                for start in range(0, size, _WRITE_BYTES):
                    block = data[start : start + _WRITE_BYTES]
                    _write(file.fileno(), block)
                    done += len(block)
                    if progress is not None:
                        progress("saving", done, total)
                data = block = memoryview(b"")  # the tensor goes before the next is read
                if size >= _TRIM_BYTES:
                    trim_heap()
            os.fsync(file.fileno())


def _write(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data) :]


def _contents(entries: Sequence[_Entry]) -> Iterator[memoryview]:
    """The bytes of each entry; only the one being written, or its group, is in memory."""
    group: _Group | None = None
    results: dict[str, torch.Tensor] = {}
    for entry in entries:
        if isinstance(entry.origin, torch.Tensor):
            yield _bytes(entry.origin)
            continue
        if entry.origin is not group:
            group, results = entry.origin, {}
            with torch.no_grad():
                results = group.revert({name: _in_memory(tensor) for name, tensor in group.inputs.items()})
        yield _bytes(results.pop(entry.name))


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The values on the CPU, read once if they rest in a file; a plain CPU tensor is not copied."""
    detached = tensor.detach().cpu()
    return detached if type(detached) is torch.Tensor else detached.clone()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order."""
    with torch.no_grad():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().data


def _write_index(files: Mapping[str, Sequence[_Entry]], path: Path) -> None:
    every = [entry for entries in files.values() for entry in entries]
    index = {
        "metadata": {
            "total_parameters": sum(torch.Size(entry.shape).numel() for entry in every),
            "total_size": sum(entry.nbytes for entry in every),
        },
        "weight_map": {entry.name: name for name, entries in files.items() for entry in entries},
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(path)


def _write_configuration(model: nn.Module, folder: Path, generation_config: Any) -> None:
    """config.json and generation_config.json, by the model's own objects, where it has them."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(model, "save_config", None)):
        model.save_config(folder)  # type: ignore[operator]
    elif callable(getattr(config, "save_pretrained", None)):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        dtype = getattr(model, "dtype", None)
        if isinstance(dtype, torch.dtype):
            config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)
    can_generate = getattr(model, "can_generate", None)
    generation_config = generation_config or getattr(model, "generation_config", None)
    if callable(can_generate) and can_generate() and generation_config is not None:
        generation_config.save_pretrained(folder)
    for path in folder.iterdir():
        sync(path)


def sync(path: Path) -> None:
    """What was written to a file, or changed in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_adapters(model: nn.Module) -> None:
    if getattr(model, "peft_config", None):
        raise InvalidArgumentError(
            "The model carries adapters, and the architecture that its config names has no place for them. Merge them "
            "first (merge_and_unload), or save them alone with the model's save_pretrained."
        )


def _refuse_too_large(folder: Path, entries: Sequence[_Entry]) -> None:
    needed = sum(entry.nbytes for entry in entries) + _SPARE_BYTES
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise DoesNotFitError(
            f"The model needs {format_bytes(needed)} in {folder} and {format_bytes(available)} is free there. Free "
            f"some space or choose another folder; what is replaced goes only when the new files are whole.",
            tier="disk",
            needed_bytes=needed,
            available_bytes=available,
        )


def _refuse_files_in_use(paths: Sequence[Path]) -> None:
    in_use = {(stat.st_dev, stat.st_ino) for stat in map(_stat, files_in_use()) if stat is not None}
    clashes = [
        path.name for path in paths if (stat := _stat(path)) is not None and (stat.st_dev, stat.st_ino) in in_use
    ]
    if clashes:
        raise SavingError(
            f"{len(clashes)} files in {paths[0].parent} are those that a model in this process streams its weights "
            f"from: {join_some(sorted(clashes))}. Save to another folder, or "
            f"call bigmodel.materialize on that model first."
        )


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
