"""From what the user named (a folder, a file, an index, a Hub repo id) to the weight files, all of them there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel.checkpoint.hub import fetch, where
from bigmodel.checkpoint.names import (
    INDEX,
    SINGLE_FILES,
    WEIGHT_SUFFIXES,
    choose,
    files_of_index,
    leaves,
    read_index,
    read_small,
    with_variant,
)
from bigmodel.checkpoint.pickled import PICKLE_SUFFIXES
from bigmodel.checkpoint.provenance import fetch_command, may_be_repo_id, unfinished_downloads
from bigmodel.errors import (
    CheckpointError,
    InvalidArgumentError,
    MalformedFileError,
    MissingFilesError,
    UnsafeFileError,
    UnsupportedCheckpointError,
    join_some,
)

__all__ = ["Location", "has_weights", "locate", "read_config"]

_HUB_FOLDER = re.compile(r"(models|datasets|spaces)--.+")


@dataclass(frozen=True, kw_only=True)
class Location:
    """The files of a checkpoint; they exist, and their names stay inside the folder.

    Attributes:
        root: absolute; the folder that was named or fetched, above any subfolder.
        folder: absolute; holds the weights and config.json.
        files: absolute, by name.
        weight_map: tensor name -> absolute file, where there is an index.
    """

    root: str
    folder: str
    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None


def locate(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
) -> Location:
    """Finds the weight files that `path` means; a Hub repo id is fetched into huggingface_hub's own cache.

    Raises:
        MissingFilesError: nothing is there, or files are missing: which, of how many, and what fetches them.
        UnsafeFileError: an index names files outside its folder.
        MalformedFileError: an index is not one.
        UnsupportedCheckpointError: a file of a format that is not read.
        InvalidArgumentError: an option that does not go with `path`.
    """
    name = os.path.expanduser(os.fsdecode(path))
    if subfolder is not None and leaves(subfolder):
        raise InvalidArgumentError(f"subfolder is {subfolder!r}. Give a folder inside the checkpoint's.")
    if not name:
        raise InvalidArgumentError("The checkpoint's path is empty. Give a folder, a file or a Hub repo id.")
    if not os.path.lexists(name):
        if isinstance(path, os.PathLike) or not may_be_repo_id(name):
            raise MissingFilesError(
                f"{name} does not exist{where(name)}. Give a folder, a weight file or a Hub repo id."
            )
        root = fetch(name, revision, subfolder, variant)
    elif revision is not None:
        raise InvalidArgumentError(f"revision is {revision!r}, and {name} is a local path. It is for Hub repo ids.")
    elif os.path.isdir(name):
        root = os.path.abspath(name)
    else:
        for option, value in (("subfolder", subfolder), ("variant", variant)):
            if value is not None:
                raise InvalidArgumentError(
                    f"{option} is {value!r}, and {name} is a file. It is for folders and repo ids."
                )
        return _locate_file(os.path.abspath(name))
    folder = os.path.normpath(os.path.join(root, subfolder or ""))
    if not os.path.isdir(folder):
        raise MissingFilesError(f"{root} has no folder {subfolder!r}. It holds {_listing(root)}.")
    return _locate_folder(root, folder, variant)


def has_weights(folder: str) -> bool:
    """Whether a folder holds weight files or an index, of whatever kind."""
    endings = WEIGHT_SUFFIXES
    return any(name.endswith(endings) or INDEX.fullmatch(name) for name in _listdir(folder))


def read_config(folder: str) -> dict[str, Any] | None:
    """config.json of a folder; None if there is none."""
    file = os.path.join(folder, "config.json")
    if not os.path.lexists(file):
        return None
    try:
        config = json.loads(read_small(file).decode("utf-8"))  # configurations in the wild hold Infinity
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"{file} is not valid JSON: {ascii(str(error))[1:-1]}.") from None
    if not isinstance(config, dict):
        raise MalformedFileError(f"{file} is a JSON {type(config).__name__}, not an object.")
    return config


def _locate_file(file: str) -> Location:
    folder, name = os.path.split(file)
    if INDEX.fullmatch(name):
        return _from_index(folder, folder, name)
    if not name.endswith(WEIGHT_SUFFIXES):
        raise UnsupportedCheckpointError(
            f"{file} is not of a format that is read: .safetensors, .index.json, {', '.join(PICKLE_SUFFIXES)}."
        )
    return Location(root=folder, folder=folder, files=(file,), weight_map=None)


def _locate_folder(root: str, folder: str, variant: str | None) -> Location:
    names = _listdir(folder)
    chosen = choose(names, variant)
    if not chosen:
        raise MissingFilesError(_no_weights(root, folder, names, variant))
    if len(chosen) == 1 and INDEX.fullmatch(chosen[0]):
        return _from_index(root, folder, chosen[0])
    files = [os.path.join(folder, name) for name in chosen]
    _check_inside(folder, files)
    _check_present(root, files)
    return Location(root=root, folder=folder, files=tuple(files), weight_map=None)


def _from_index(root: str, folder: str, name: str) -> Location:
    weight_map = read_index(os.path.join(folder, name))
    names = files_of_index(os.path.join(folder, name), weight_map)
    absolute = {file: os.path.normpath(os.path.join(folder, file)) for file in names}
    files = sorted(set(absolute.values()))
    _check_inside(folder, files)
    _check_present(root, files)
    return Location(
        root=root,
        folder=folder,
        files=tuple(files),
        weight_map={tensor: absolute[file] for tensor, file in weight_map.items()},
    )


def _check_inside(folder: str, files: Sequence[str]) -> None:
    """Refuses links out of the folder, except to the blobs of a Hub cache: an unpacked archive can hold any link."""
    root = os.path.realpath(folder)
    outside = []
    for file in files:
        target = os.path.realpath(file)
        if os.path.commonpath([root, target]) != root and not _is_hub_blob(target):
            outside.append(f"{os.path.basename(file)} -> {target}")
    if outside:
        raise UnsafeFileError(
            f"{folder} has {len(outside)} weight files that are links out of the folder: {join_some(outside)}. "
            "Give the folder or file that they lead to, or put the files themselves (hard links will do) here."
        )


def _is_hub_blob(target: str) -> bool:
    parent, _ = os.path.split(target)
    repo, name = os.path.split(parent)
    return name == "blobs" and _HUB_FOLDER.fullmatch(os.path.basename(repo)) is not None


def _check_present(root: str, files: Sequence[str]) -> None:
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        names = join_some(os.path.relpath(file, root) for file in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise MissingFilesError(
            f"{len(missing)} of {len(files)} files {verb} missing in {root}: {names}.{_unfinished(root)} "
            f"Fetch {'it' if len(missing) == 1 else 'them'} with: {fetch_command(root, missing)}"
        )


def _no_weights(root: str, folder: str, names: Sequence[str], variant: str | None) -> str:
    kind = f"weights of variant {variant!r}" if variant else "weights"
    usual = (SINGLE_FILES[0], f"{SINGLE_FILES[0]}.index.json", SINGLE_FILES[2])
    expected = ", ".join(with_variant(name, variant) for name in usual)
    text = (
        f"{folder} holds no {kind}. Expected {expected}, or one other .safetensors file or index; "
        f"it holds {_listing(folder)}."
    )
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES) or INDEX.fullmatch(name)]
    inside = [
        name
        for name in names
        if os.path.isdir(os.path.join(folder, name)) and choose(_listdir(os.path.join(folder, name)), variant)
    ]
    if inside:
        return f"{text} Weights are in its folders {join_some(map(repr, inside))}: name one with subfolder."
    if weights:
        return f"{text} Which of its weight files is meant is not clear: give the file or index itself."
    return f"{text}{_unfinished(root)} Fetch them with: {fetch_command(root)}"


def _unfinished(root: str) -> str:
    count = unfinished_downloads(root)
    return f" {count} unfinished download{'s are' if count > 1 else ' is'} there (*.incomplete)." if count else ""


def _listdir(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}.") from None


def _listing(folder: str) -> str:
    return join_some(_listdir(folder), limit=12) or "nothing"
