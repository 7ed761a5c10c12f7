"""Where a folder of weights came from, as far as it shows: for the command that fetches what is missing from it."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["fetch_command", "may_be_repo_id", "unfinished_downloads"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_MAX_NAMED = 8  # files named one by one in a command


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A folder inside huggingface_hub's cache: ``<cache>/models--org--name/snapshots/<commit>[/subfolder]``."""

    folder: str
    repo_folder: str
    repo_id: str
    commit: str


def may_be_repo_id(name: str) -> bool:
    """Whether a text can be a Hub repo id (``org/name`` or ``name``) rather than a path."""
    return _REPO_ID.fullmatch(name) is not None and not name.endswith(_FILE_SUFFIXES)


def fetch_command(root: str, files: Sequence[str] = (), *, again: bool = False) -> str:
    """The `hf download` that fetches a checkpoint, or some of its files.

    Args:
        root: absolute; the checkpoint's folder, above any subfolder.
        files: absolute; empty for all.
        again: they are there, and broken.
    """
    snapshot = _snapshot_of(root)
    base = root if snapshot is None else snapshot.folder
    repo_id = _stated_repo(root) if snapshot is None else snapshot.repo_id
    names = [os.path.relpath(file, base) for file in files]
    options = ["--local-dir", root] if snapshot is None else []
    if snapshot is not None and not _is_main(snapshot):
        options += ["--revision", snapshot.commit]
    if len(names) > _MAX_NAMED:
        options += [
            part
            for suffix in sorted({os.path.splitext(name)[1] for name in names})
            for part in ("--include", f"*{suffix}")
        ]
        names = []
    options += ["--force-download"] if again else []
    words = [shlex.quote(word) for word in (*names, *options)]
    return " ".join(["hf download", repo_id or "<repo id>", *words])


def unfinished_downloads(root: str) -> int:
    """How many downloads into a folder, or its part of the Hub's cache, were begun and did not end."""
    snapshot = _snapshot_of(root)
    places = [(root, "*.incomplete"), (os.path.join(root, ".cache", "huggingface"), "**/*.incomplete")]
    if snapshot is not None:
        places = [(os.path.join(snapshot.repo_folder, "blobs"), "*.incomplete")]
    return sum(len(glob.glob(pattern, root_dir=place, recursive=True)) for place, pattern in places)


def _snapshot_of(folder: str) -> _Snapshot | None:
    while folder != os.path.dirname(folder):
        parent, commit = os.path.split(folder)
        repo_folder, name = os.path.split(parent)
        kind, _, repo = os.path.basename(repo_folder).partition("--")
        if name == "snapshots" and kind == "models" and repo:
            return _Snapshot(folder, repo_folder, repo.replace("--", "/"), commit)
        folder = parent
    return None


def _is_main(snapshot: _Snapshot) -> bool:
    try:
        with open(os.path.join(snapshot.repo_folder, "refs", "main"), encoding="ascii") as file:
            return file.read(64).strip() == snapshot.commit
    except (OSError, ValueError):
        return False


def _stated_repo(folder: str) -> str | None:
    """The repo id that config.json keeps as the name it was loaded from, if it is one."""
    try:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            name = json.load(file)["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # this is a hint in another error; the config's own faults are told where it is read
    return name if isinstance(name, str) and "/" in name and may_be_repo_id(name) else None
