"""The cache of tensors that had to be rewritten: safetensors files, each there whole or not at all.

A file's name and metadata hold a key made from the source's real path, size and times. A copy of another file, or of an
older state of this one, has another key and is never met.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bigmodel.checkpoint.header import encode_header, read_header
from bigmodel.checkpoint.spec import TensorSpec
from bigmodel.errors import CheckpointError, DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["default_cache_folder", "file_stamp", "rewritten_specs"]

_log = logging.getLogger("bigmodel.checkpoint")

_CACHE_VERSION = "1"  # raise it when what is written changes
_WRITE_BYTES = 64 << 20


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/bigmodel``, by default ``~/.cache/bigmodel``; not made here."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "bigmodel"


def file_stamp(file: str) -> str:
    """What tells this content of this file from any other: real path, size, and times of change.

    The change time (ctime) is among them because a file can be overwritten and its modification time set back.
    """
    status = os.stat(file)
    return json.dumps([os.path.realpath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def rewritten_specs(
    file: str, names: frozenset[str] | None, load: Callable[[], dict[str, torch.Tensor]], folder: Path
) -> list[TensorSpec]:
    """Tensors of `file` as ranges of a safetensors file in the cache, which is written if it is not there.

    Args:
        file: absolute path of the source.
        names: which of its tensors; None for all.
        load: gives them (or more), on the CPU. Called only if they must be written.
        folder: the cache; made if it is not there.

    Raises:
        DoesNotFitError: its disk is too small.
        UnsupportedCheckpointError: a dtype that safetensors has no name for.
        CheckpointError: it cannot be written, or `file` changed meanwhile.
    """
    stamp = file_stamp(file)
    wanted = "all" if names is None else json.dumps(sorted(names))
    key = hashlib.sha256("\0".join([_CACHE_VERSION, stamp, wanted]).encode("utf-8", "surrogateescape")).hexdigest()
    target = folder / "rewritten" / f"{key}.safetensors"
    found = _cached(target, key)
    if found is not None:
        return found
    _log.info("%s cannot be streamed as it is: tensors of it are rewritten to %s", file, target)
    weights = {name: tensor for name, tensor in load().items() if names is None or name in names}
    try:
        _write(weights, target, key)
        is_same = file_stamp(file) == stamp
        if not is_same:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{file} has tensors that must be rewritten, and {target.parent} cannot be written: {error.strerror}. "
            "Give another folder, or use the safetensors files of this model."
        ) from None
    found = _cached(target, key) if is_same else None
    if found is None:
        raise CheckpointError(f"{file} or its copy {target} changed while it was rewritten. Open the checkpoint again.")
    return found


def _cached(target: Path, key: str) -> list[TensorSpec] | None:
    try:
        header = read_header(str(target))
        aliases: dict[str, str] = json.loads(header.metadata["bigmodel_aliases"])
    except (CheckpointError, KeyError, ValueError):
        return None  # not there, or cut short by a failing disk: written again
    if header.metadata.get("bigmodel_key") != key:
        return None
    by_name = {spec.name: spec for spec in header.tensors}
    return [*header.tensors, *(replace(by_name[name], name=alias) for alias, name in aliases.items())]


def _write(weights: Mapping[str, torch.Tensor], target: Path, key: str) -> None:
    """Writes a safetensors file under a temporary name, then renames it. Equal views of a storage are written once."""
    storages = [tensor.untyped_storage() for tensor in weights.values()]  # kept, so that no id is given twice
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for (name, tensor), storage in zip(weights.items(), storages, strict=True):
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg())
        original = first.setdefault((id(storage), *view), name)
        if original != name:
            aliases[name] = original
    kept = {name: weights[name] for name in first.values()}
    metadata = {"format": "pt", "bigmodel_key": key, "bigmodel_aliases": json.dumps(aliases)}
    header = encode_header(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()), metadata)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    needed = len(header) + sum(tensor.numel() * tensor.dtype.itemsize for tensor in kept.values())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise DoesNotFitError(
            f"{target.parent} needs {format_bytes(needed)} for rewritten tensors, and {format_bytes(free)} is free. "
            "Give a folder on a larger disk, or use the safetensors files of this model.",
            tier="disk",
            needed_bytes=needed,
            available_bytes=free,
        )
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(header)
            for tensor in kept.values():
                flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                for begin in range(0, flat.numel(), _WRITE_BYTES):
                    stream.write(flat[begin : begin + _WRITE_BYTES].numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the name, too, survives a power cut
    finally:
        os.close(folder)
