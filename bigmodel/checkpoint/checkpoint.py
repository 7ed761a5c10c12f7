"""A checkpoint opened: every tensor's place, size and dtype known and checked, and no weight read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint.header import IncompleteFileError, read_header
from bigmodel.checkpoint.pickled import read_pickle
from bigmodel.checkpoint.provenance import fetch_command
from bigmodel.checkpoint.resolve import Location, locate, read_config
from bigmodel.checkpoint.rewritten import RewriteCache, default_cache_folder
from bigmodel.checkpoint.spec import TensorSpec
from bigmodel.checkpoint.stamp import FileStamp, stamp_key
from bigmodel.errors import (
    CheckpointError,
    InvalidArgumentError,
    MalformedFileError,
    MissingFilesError,
    UnsafeFileError,
    UnsupportedCheckpointError,
    join_some,
)
from bigmodel.progress import Report

__all__ = ["Checkpoint", "fingerprint_of", "open_checkpoint", "refuse_prequantised"]

_MAX_READERS = 16  # headers are small: what threads hide is the latency of a network disk


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What a checkpoint holds and where, without its bytes.

    Attributes:
        path: the folder with the weights and config.json (of a Hub repo, its snapshot in the cache).
        files: the checkpoint's own weight files, absolute, by name. Specs of rewritten tensors name cache files.
        tensors: name -> where it is; by file, then offset.
        config: config.json, None if there is none.
        fingerprint: names, dtypes, shapes and places in the files: equal for equal copies on any machine.
        content_key: fingerprint and each file's path, size and times: for caches of what was made from the bytes.
        stamps: of every file that a tensor is in, as it was when its header was read.
        tied: groups of names whose bytes are one range, each in order; groups of one are left out.
    """

    path: Path
    files: tuple[str, ...]
    tensors: Mapping[str, TensorSpec]
    config: dict[str, Any] | None
    fingerprint: str
    content_key: str
    stamps: Mapping[str, FileStamp]
    tied: tuple[tuple[str, ...], ...]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    allowance: DiskAllowance | None = None,
    progress: Report | None = None,
) -> Checkpoint:
    """Reads the headers of a checkpoint and checks them against the files and the index.

    Args:
        path: a folder, a .safetensors file, an index, a .bin, .pt or .pth file (read weights-only), or a Hub repo id.
        revision: branch, tag or commit, for a repo id.
        subfolder: where in the folder or repo the weights are.
        variant: as in ``model.fp16.safetensors``.
        cache_folder: for tensors of pickles that are no ranges of their file; None for the user's cache folder.
        allowance: what may be written there; None for what the disk has free.
        progress: called with (phase, done bytes, total bytes) while something is written.

    Raises:
        MissingFilesError: files that are not there: which of how many, and the command that fetches them.
        UnsafeFileError: names that leave the folder, or a pickle with code in it.
        MalformedFileError: truncated files, contradictions in headers or index; all of them.
        UnsupportedCheckpointError: formats and dtypes that are not read.
        InvalidArgumentError: options that do not go with `path`.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(
            f"path is {path!r}. Give a folder, a weight file, an index file, or a Hub repo id such as 'org/name'."
        )
    cache = RewriteCache(
        Path(cache_folder) if cache_folder is not None else default_cache_folder(),
        allowance or DiskAllowance(),
        progress,
    )
    location = locate(path, revision=revision, subfolder=subfolder, variant=variant)
    config = read_config(location.folder)
    stamps = _stamps(location)
    contents = _read_all(location, cache)
    if _stamps(location) != stamps:
        raise CheckpointError(f"Files in {location.folder} changed while they were read. Open the checkpoint again.")
    tensors = _merged(location, contents)
    fingerprint = fingerprint_of(
        {os.path.relpath(file, location.folder): own for file, own in zip(location.files, contents, strict=True)}
    )
    return Checkpoint(
        path=Path(location.folder),
        files=location.files,
        tensors=tensors,
        config=config,
        fingerprint=fingerprint,
        content_key=_digest([fingerprint, *(stamp_key(file, stamp) for file, stamp in stamps.items())]),
        stamps=stamps | {file: FileStamp.of(file) for file in {spec.file for spec in tensors.values()} - stamps.keys()},
        tied=_tied(tensors.values()),
    )


def refuse_prequantised(checkpoint: Checkpoint) -> None:
    """Raises if config.json says that the weights are quantised, at its top or in a sub-config such as text_config.

    Raises:
        UnsupportedCheckpointError: names the method.
    """
    config = checkpoint.config or {}
    parts = {"": config} | {
        key: part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict)
    }
    for key, part in parts.items():
        stated = part.get("quantization_config")
        if not isinstance(stated, dict) or not stated:
            continue
        method = stated.get("quant_method") or (
            "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(stated) else "unnamed"
        )
        place = f"{key}.quantization_config" if key else "quantization_config"
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is pre-quantised with the method {method!r} ({place} in config.json), which is not "
            "read yet. Use the model's checkpoint in bfloat16 or float16."
        )


def _stamps(location: Location) -> dict[str, FileStamp]:
    try:
        return {file: FileStamp.of(file) for file in location.files}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _read_all(location: Location, cache: RewriteCache) -> list[tuple[TensorSpec, ...]]:
    """The tensors of each file, in the order of the files; the faults of all files are raised together."""

    def read(file: str) -> tuple[TensorSpec, ...] | CheckpointError:
        try:
            return read_header(file).tensors if file.endswith(".safetensors") else read_pickle(file, cache)
        except CheckpointError as error:
            return error

    headers = [file for file in location.files if file.endswith(".safetensors")]
    with ThreadPoolExecutor(max_workers=min(_MAX_READERS, max(1, len(headers)))) as readers:
        found = dict(zip(headers, readers.map(read, headers), strict=True))
    for file in location.files:  # one pickle at a time: it may have to be rewritten
        if file not in found:
            found[file] = read(file)
    faults = [found[file] for file in location.files]
    _raise_together({file: fault for file, fault in found.items() if isinstance(fault, CheckpointError)}, location)
    return [contents for contents in faults if isinstance(contents, tuple)]


def _raise_together(faults: Mapping[str, CheckpointError], location: Location) -> None:
    """One error for all faults of the gravest kind."""
    for kind in (UnsafeFileError, MissingFilesError, MalformedFileError, UnsupportedCheckpointError, CheckpointError):
        same = {file: fault for file, fault in faults.items() if isinstance(fault, kind)}
        if not same:
            continue
        texts = [join_some(map(str, same.values()), separator="\n")]
        if len(same) > 1:
            texts.insert(0, f"{len(same)} of {len(location.files)} files cannot be read:")
        broken = [file for file, fault in same.items() if isinstance(fault, (IncompleteFileError, MissingFilesError))]
        if broken:
            them = "it" if len(broken) == 1 else "them"
            texts.append(f"Fetch {them} again with: {fetch_command(location.root, broken, again=True)}")
        raise kind((" " if len(same) == 1 else "\n").join(texts)) from None


def _merged(location: Location, contents: Sequence[Sequence[TensorSpec]]) -> dict[str, TensorSpec]:
    """name -> tensor, checked against the index: what it names must be in that file, and no name may be ambiguous."""
    weight_map = location.weight_map
    tensors: dict[str, TensorSpec] = {}
    held: dict[str, str] = {}
    twice: list[str] = []
    for file, specs in zip(location.files, contents, strict=True):
        for spec in specs:
            if weight_map is not None and weight_map.get(spec.name, file) != file:
                continue  # a copy; the index says that another file's counts
            if spec.name in tensors:
                twice.append(f"{spec.name!a} in {os.path.basename(held[spec.name])} and {os.path.basename(file)}")
            tensors[spec.name], held[spec.name] = spec, file
    absent = [
        f"{name!a} in {os.path.basename(file)}" for name, file in (weight_map or {}).items() if held.get(name) != file
    ]
    if absent:
        raise MalformedFileError(
            f"{location.folder}: the index names {len(weight_map or ())} tensors, and {len(absent)} of them are not in "
            f"their files: {join_some(absent)}. The index is of another version than the files. Fetch the checkpoint "
            f"again with: {fetch_command(location.root, again=True)}"
        )
    if twice:
        raise MalformedFileError(
            f"{location.folder}: {len(twice)} tensors are in two files, and no index decides: {join_some(twice)}. "
            "Give the file that is meant."
        )
    return tensors


def fingerprint_of(files: Mapping[str, Sequence[TensorSpec]]) -> str:
    """Names, dtypes, shapes and places of tensors, by file: equal for equal copies, also for those known by headers alone.

    Args:
        files: name of a file, as seen from the checkpoint's folder -> its tensors.
    """
    lines = []
    for name, specs in files.items():
        lines.append(name)
        start = {own: min(s.offset for s in specs if s.file == own) for own in {s.file for s in specs}}
        ordered = sorted(specs, key=lambda s: (s.file, s.offset, s.name))
        lines.append(json.dumps([[s.name, str(s.dtype), s.shape, s.offset - start[s.file]] for s in ordered]))
    return _digest(lines)


def _tied(specs: Iterable[TensorSpec]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[str, int, int], list[str]] = {}
    for spec in specs:
        if spec.nbytes:
            groups.setdefault((spec.file, spec.offset, spec.nbytes), []).append(spec.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
