"""From what the user named (a folder, a file, an index, a Hub repo id) to the weight files, all of them there."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bigmodel.checkpoint.header import open_regular, parse_json
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

__all__ = ["Location", "has_weights", "headers_in_repo", "locate", "read_config"]

SINGLE_FILES = (  # in order of preference; each may also be split, with an index
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
MAX_JSON_BYTES = 100_000_000
# What stands beside the weights: configuration, tokenizer, chat template; code is fetched, and run only on request.
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.spm", "*.vocab"]
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\.\w+)")
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
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
    if subfolder is not None and _leaves(subfolder):
        raise InvalidArgumentError(f"subfolder is {subfolder!r}. Give a folder inside the checkpoint's.")
    if not name:
        raise InvalidArgumentError("The checkpoint's path is empty. Give a folder, a file or a Hub repo id.")
    if not os.path.lexists(name):
        if isinstance(path, os.PathLike) or not may_be_repo_id(name):
            raise MissingFilesError(
                f"{name} does not exist{_where(name)}. Give a folder, a weight file or a Hub repo id."
            )
        root = _fetch(name, revision, subfolder, variant)
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
    endings = (".safetensors", *PICKLE_SUFFIXES)
    return any(name.endswith(endings) or _INDEX.fullmatch(name) for name in _listdir(folder))


def read_config(folder: str) -> dict[str, Any] | None:
    """config.json of a folder; None if there is none."""
    file = os.path.join(folder, "config.json")
    if not os.path.lexists(file):
        return None
    try:
        config = json.loads(_read_small(file).decode("utf-8"))  # configurations in the wild hold Infinity
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"{file} is not valid JSON: {ascii(str(error))[1:-1]}.") from None
    if not isinstance(config, dict):
        raise MalformedFileError(f"{file} is a JSON {type(config).__name__}, not an object.")
    return config


def _locate_file(file: str) -> Location:
    folder, name = os.path.split(file)
    if _INDEX.fullmatch(name):
        return _from_index(folder, folder, name)
    if not name.endswith((".safetensors", *PICKLE_SUFFIXES)):
        raise UnsupportedCheckpointError(
            f"{file} is not of a format that is read: .safetensors, .index.json, {', '.join(PICKLE_SUFFIXES)}."
        )
    return Location(root=folder, folder=folder, files=(file,), weight_map=None)


def _locate_folder(root: str, folder: str, variant: str | None) -> Location:
    names = _listdir(folder)
    chosen = _choose(names, variant)
    if not chosen:
        raise MissingFilesError(_no_weights(root, folder, names, variant))
    if len(chosen) == 1 and _INDEX.fullmatch(chosen[0]):
        return _from_index(root, folder, chosen[0])
    files = [os.path.join(folder, name) for name in chosen]
    _check_inside(folder, files)
    _check_present(root, files)
    return Location(root=root, folder=folder, files=tuple(files), weight_map=None)


def _choose(names: Collection[str], variant: str | None) -> list[str]:
    """The weight file, index, or files of a split without an index, among a folder's names; [] if none is meant."""
    for single in SINGLE_FILES:
        for name in (_with_variant(single, variant), _with_variant(f"{single}.index.json", variant)):
            if name in names:
                return [name]
    if variant is not None:
        names = [name for name in names if f".{variant}." in name or f".{variant}-" in name]
    indexes = [name for name in names if _INDEX.fullmatch(name)]
    if len(indexes) == 1:
        return indexes
    for suffix in (".safetensors", ".bin"):
        weights = [name for name in names if name.endswith(suffix)]
        splits = {(part["stem"], part["count"]) for name in weights if (part := _PART.fullmatch(name))}
        if len(splits) == 1 and all(_PART.fullmatch(name) for name in weights):
            ((stem, count),) = splits
            if int(count) <= 100_000:
                return [f"{stem}-{number:0{len(count)}}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
        if len(weights) == 1 and suffix == ".safetensors":
            return weights
    return []


def _with_variant(name: str, variant: str | None) -> str:
    """``model.safetensors`` -> ``model.fp16.safetensors``; an index becomes ``model.safetensors.index.fp16.json``."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.{variant}{suffix}" if variant else name


def _from_index(root: str, folder: str, name: str) -> Location:
    weight_map = _read_index(os.path.join(folder, name))
    names = sorted(set(weight_map.values()))
    unsafe = [name for name in names if _leaves(name)]
    if unsafe:
        raise UnsafeFileError(
            f"{os.path.join(folder, name)} names {len(unsafe)} of {len(names)} files outside its folder: "
            f"{join_some(map(ascii, unsafe))}. The checkpoint is not read."
        )
    strange = [name for name in names if not name.endswith((".safetensors", *PICKLE_SUFFIXES))]
    if strange:
        raise UnsupportedCheckpointError(
            f"{os.path.join(folder, name)} names files of formats that are not read: {join_some(map(ascii, strange))}."
        )
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


def _read_index(file: str) -> dict[str, str]:
    index = parse_json(_read_small(file), file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFileError(f"{file} is not an index: it has no weight_map of tensor names to file names.")
    wrong = [tensor for tensor, name in weight_map.items() if not isinstance(name, str) or not name or "\0" in name]
    if wrong:
        raise MalformedFileError(f"{file} names no file for {len(wrong)} tensors: {join_some(map(ascii, wrong))}.")
    return weight_map


def _read_small(file: str) -> bytes:
    descriptor, status = open_regular(file)
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size > MAX_JSON_BYTES:
            raise MalformedFileError(f"{file} has {status.st_size} bytes; at most {MAX_JSON_BYTES} are allowed.")
        return stream.read()


def _leaves(name: str) -> bool:
    """Whether a relative file name, read as on any system, leads out of its folder."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name) is not None


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
    expected = ", ".join(_with_variant(name, variant) for name in usual)
    text = (
        f"{folder} holds no {kind}. Expected {expected}, or one other .safetensors file or index; "
        f"it holds {_listing(folder)}."
    )
    weights = [name for name in names if name.endswith((".safetensors", *PICKLE_SUFFIXES)) or _INDEX.fullmatch(name)]
    inside = [
        name
        for name in names
        if os.path.isdir(os.path.join(folder, name)) and _choose(_listdir(os.path.join(folder, name)), variant)
    ]
    if inside:
        return f"{text} Weights are in its folders {join_some(map(repr, inside))}: name one with subfolder."
    if weights:
        return f"{text} Which of its weight files is meant is not clear: give the file or index itself."
    return f"{text}{_unfinished(root)} Fetch them with: {fetch_command(root)}"


def _unfinished(root: str) -> str:
    count = unfinished_downloads(root)
    return f" {count} unfinished download{'s are' if count > 1 else ' is'} there (*.incomplete)." if count else ""


def _where(name: str) -> str:
    return "" if os.path.isabs(name) else f" in {os.getcwd()}"


def _listdir(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}.") from None


def _listing(folder: str) -> str:
    return join_some(_listdir(folder), limit=12) or "nothing"


@dataclass(frozen=True, kw_only=True)
class _Repo:
    """What a repo has, without its weights: its small files are in the Hub's cache.

    Attributes:
        named: repo and revision, for errors.
        folder: the snapshot.
        prefix: of the subfolder.
        weights: names of the weight files that are meant, with the prefix.
        weight_map: tensor name -> one of those, where there is an index.
    """

    named: str
    folder: str
    prefix: str
    weights: tuple[str, ...]
    weight_map: Mapping[str, str] | None


def headers_in_repo(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
) -> tuple[str, dict[str, dict[str, Any]], Mapping[str, str] | None] | None:
    """What the headers of a Hub repo's safetensors files say, without fetching the weights.

    Returns:
        The folder with the repo's small files; file name -> its header's table; the index's tensor -> file name. None where
        `path` is local, its weights are in the Hub's cache, the Hub cannot be asked, or the weights are not safetensors:
        `locate` says then what there is.

    Raises:
        MissingFilesError: the repo, or what is meant in it, is not there.
        MalformedFileError: a header is not one.
    """
    from huggingface_hub import HfApi, errors

    name = os.path.expanduser(os.fsdecode(path))
    if isinstance(path, os.PathLike) or os.path.lexists(name) or not may_be_repo_id(name):
        return None
    found = _in_repo(name, revision, subfolder, variant)
    if isinstance(found, str) or not all(file.endswith(".safetensors") for file in found.weights):
        return None
    if all(os.path.exists(os.path.join(found.folder, file)) for file in found.weights):
        return None

    def read(file: str) -> dict[str, Any]:
        metadata = HfApi().parse_safetensors_file_metadata(name, file, revision=revision)
        return {
            key: {"dtype": each.dtype, "shape": each.shape, "data_offsets": list(each.data_offsets)}
            for key, each in metadata.tensors.items()
        }

    try:
        with ThreadPoolExecutor(max_workers=8) as readers:  # what threads hide is the way to the Hub
            tables = list(readers.map(read, found.weights))
    except errors.SafetensorsParsingError as error:
        raise MalformedFileError(f"A header of {found.named} cannot be read: {_one_line(error)}.") from None
    except Exception as error:  # of huggingface_hub's HTTP library
        raise MissingFilesError(f"The headers of {found.named} could not be read: {_one_line(error)}") from None
    folder = os.path.normpath(os.path.join(found.folder, found.prefix))
    names = [file.removeprefix(found.prefix) for file in found.weights]
    return folder, dict(zip(names, tables, strict=True)), found.weight_map


def _fetch(repo_id: str, revision: str | None, subfolder: str | None, variant: str | None) -> str:
    """A repo's snapshot folder in the Hub's cache; unless offline, its weights (safetensors, if any) are fetched."""
    from huggingface_hub import snapshot_download

    found = _in_repo(repo_id, revision, subfolder, variant)
    if isinstance(found, str) or not found.weights:
        return found if isinstance(found, str) else found.folder
    try:
        wanted = [glob.escape(name) for name in found.weights]
        return snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
    except Exception as error:
        raise MissingFilesError(
            f"{found.named} could not be fetched whole: {_one_line(error)} {_advice(repo_id)}"
        ) from None


def _in_repo(repo_id: str, revision: str | None, subfolder: str | None, variant: str | None) -> _Repo | str:
    """What a repo has, its small files fetched; or its snapshot in the cache, where the Hub cannot be asked."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    def cached() -> str:
        # No pattern: the folder as it is. What is missing in it is ours to say, by name and number.
        return snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[])

    named = repo_id if revision is None else f"{repo_id} (revision {revision})"
    neither = f"{named} is no local path{_where(repo_id)} and not in the Hub's cache"
    try:
        if constants.HF_HUB_OFFLINE:
            return cached()
        repo_files = [sibling.rfilename for sibling in HfApi().model_info(repo_id, revision=revision).siblings or []]
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        raise MissingFilesError(f"{named} cannot be fetched: {_one_line(error)}") from None
    except Exception as error:  # without a connection, of huggingface_hub's HTTP library, which changes
        try:
            return cached()  # as huggingface_hub does: what was fetched stays usable without the Hub or a token
        except Exception:
            pass
        if isinstance(error, errors.LocalEntryNotFoundError):
            text = f"{neither}, and the Hub is offline (HF_HUB_OFFLINE). {_advice(repo_id)}"
        elif isinstance(error, errors.GatedRepoError):
            text = f"{named} cannot be fetched: {_one_line(error)} Ask for access on its page, then run: hf auth login"
        elif isinstance(error, errors.RepositoryNotFoundError):
            text = f"{neither}, and the Hub shows no such repo. Check the name; for a private repo run: hf auth login"
        else:
            text = f"{neither}, and the Hub cannot be reached ({_one_line(error)}). {_advice(repo_id)}"
        raise MissingFilesError(text) from None
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [name.removeprefix(prefix) for name in repo_files if name.startswith(prefix)]
    chosen = _choose([name for name in names if "/" not in name], variant)
    if not chosen:
        kind = "weights" if variant is None else f"weights of variant {variant!r}"
        raise MissingFilesError(
            f"{named} holds no {kind} that are read{f' in {subfolder}' if subfolder else ''}: no safetensors files, no "
            f".bin files. It holds {join_some(repo_files, limit=12) or 'nothing'}."
        )
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=_SMALL_FILES)
    except Exception as error:
        raise MissingFilesError(f"{named} could not be fetched whole: {_one_line(error)} {_advice(repo_id)}") from None
    weight_map = None
    if len(chosen) == 1 and _INDEX.fullmatch(chosen[0]):
        weight_map = _read_index(os.path.join(folder, prefix, chosen[0]))
        chosen = sorted(set(weight_map.values()))
    weights = tuple(prefix + name for name in chosen if prefix + name in repo_files)
    return _Repo(named=named, folder=folder, prefix=prefix, weights=weights, weight_map=weight_map)


def _advice(repo_id: str) -> str:
    return f"Give a local folder, or fetch it with: hf download {repo_id}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return ascii(text[:300])[1:-1]
