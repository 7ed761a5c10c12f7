"""A Hub repo: its small files and its headers, or all of it fetched into huggingface_hub's own cache."""

from __future__ import annotations

import glob
import os
import posixpath
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bigmodel.checkpoint.names import INDEX, choose, files_of_index, read_index
from bigmodel.checkpoint.provenance import may_be_repo_id
from bigmodel.errors import MalformedFileError, MissingFilesError, UnsupportedCheckpointError, join_some
from bigmodel.units import format_bytes

__all__ = ["fetch", "headers_in_repo", "where"]

# What stands beside the weights: configuration, tokenizer, chat template; code is fetched, and run only on request.
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.spm", "*.vocab"]


@dataclass(frozen=True, kw_only=True)
class _Repo:
    """What a repo has, without its weights: its small files are in the Hub's cache.

    Attributes:
        named: repo and revision, for errors.
        folder: the snapshot.
        prefix: of the subfolder.
        weights: names of the weight files that are meant and there, with the prefix; by name.
        absent: those that are meant and not there, likewise.
        weight_map: tensor name -> one of both, without the prefix, where there is an index.
    """

    named: str
    folder: str
    prefix: str
    weights: tuple[str, ...]
    absent: tuple[str, ...]
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
        `path` is local, its weights are in the Hub's cache, or the Hub cannot be asked: `locate` says then what there is.

    Raises:
        MissingFilesError: the repo, or what is meant in it, is not there.
        MalformedFileError: a header or an index is not one.
        UnsafeFileError: an index names files outside its folder.
        UnsupportedCheckpointError: the weights are not safetensors, and not in the Hub's cache.
    """
    from huggingface_hub import HfApi, errors

    name = os.path.expanduser(os.fsdecode(path))
    if isinstance(path, os.PathLike) or os.path.lexists(name) or not may_be_repo_id(name):
        return None
    found = _in_repo(name, revision, subfolder, variant)
    if isinstance(found, str):
        return None
    if found.absent:
        count = len(found.absent) + len(found.weights)
        raise MissingFilesError(
            f"{found.named} lacks {len(found.absent)} of the {count} weight files that it names: "
            f"{join_some(found.absent)}. Give another revision, or a repo that is whole."
        )
    if all(os.path.exists(os.path.join(found.folder, file)) for file in found.weights):
        return None
    if not all(file.endswith(".safetensors") for file in found.weights):
        # `locate` would fetch them whole, unless it only has to link what an older snapshot has too.
        known = _sizes_and_blobs(name, revision, found)
        if all(file in known and os.path.exists(known[file][1]) for file in found.weights):
            return None
        raise UnsupportedCheckpointError(_no_headers(name, revision, found, [size for size, _ in known.values()]))

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


def _sizes_and_blobs(repo_id: str, revision: str | None, found: _Repo) -> dict[str, tuple[int, str]]:
    """Weight file -> its bytes, and where the Hub's cache has or would have it; {} where the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repo_id, revision=revision, files_metadata=True).siblings or []
    except Exception:  # the sizes are only told
        return {}
    blobs = os.path.join(os.path.dirname(os.path.dirname(found.folder)), "blobs")
    return {
        file.rfilename: (file.size, os.path.join(blobs, (file.lfs.sha256 if file.lfs else file.blob_id) or "none"))
        for file in siblings
        if file.rfilename in found.weights and file.size is not None
    }


def _no_headers(repo_id: str, revision: str | None, found: _Repo, sizes: Sequence[int]) -> str:
    """What to do about weights that are planned for only where they are."""
    others = [file for file in found.weights if not file.endswith(".safetensors")]
    lack = "has no safetensors file" if len(others) == len(found.weights) else "has other than safetensors files"
    size = f", {format_bytes(sum(sizes))} in all" if len(sizes) == len(found.weights) else ""
    command = shlex.join(["hf", "download", repo_id, *(["--revision", revision] if revision else [])])
    return (
        f"{found.named} {lack} for the weights that are meant: {join_some(others)}{size}. They can only be fetched whole, "
        f"which a plan does not do. Fetch the repo with `{command}` and plan for its folder, or plan where it is cached already."
    )


def fetch(repo_id: str, revision: str | None, subfolder: str | None, variant: str | None) -> str:
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
    neither = f"{named} is no local path{where(repo_id)} and not in the Hub's cache"
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
    chosen = choose([name for name in names if "/" not in name], variant)
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
    if len(chosen) == 1 and INDEX.fullmatch(chosen[0]):
        index = os.path.join(folder, prefix, chosen[0])
        weight_map = read_index(index)
        files_of_index(index, weight_map)
        weight_map = {tensor: posixpath.normpath(name) for tensor, name in weight_map.items()}
        chosen = sorted(set(weight_map.values()))
    meant = [prefix + name for name in chosen]
    return _Repo(
        named=named,
        folder=folder,
        prefix=prefix,
        weights=tuple(name for name in meant if name in repo_files),
        absent=tuple(name for name in meant if name not in repo_files),
        weight_map=weight_map,
    )


def _advice(repo_id: str) -> str:
    return f"Give a local folder, or fetch it with: hf download {repo_id}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return ascii(text[:300])[1:-1]


def where(name: str) -> str:
    """The folder that a relative name was looked for in, for errors."""
    return "" if os.path.isabs(name) else f" in {os.getcwd()}"
