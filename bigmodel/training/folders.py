"""Checkpoints as folders: which are complete, which is the newest, and how one comes to its place whole."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

from bigmodel.errors import MissingFilesError, TrainingError
from bigmodel.saving import sync

__all__ = ["KIND", "MANIFEST", "VERSION", "complete_ones", "is_complete", "prune", "put", "read_manifest"]

KIND, VERSION = "bigmodel.training", 2
MANIFEST = "manifest.json"
"""Written last: what has one is complete."""
_AT_FDCWD, _EXCHANGE = -100, 2


def read_manifest(folder: Path) -> dict[str, Any]:
    """Of a complete checkpoint.

    Raises:
        MissingFilesError: it is not there, or not complete.
        TrainingError: a newer version wrote it.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["kind"] != KIND:
            raise ValueError("of another program")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MissingFilesError(
            f"{folder} has no complete checkpoint of a training run. Give one that run.save wrote, or use run.load_last."
        ) from error
    if manifest.get("version") != VERSION:
        raise TrainingError(
            f"{folder} is of version {manifest.get('version')}, and this bigmodel reads version {VERSION}. Install "
            "the one that wrote it."
        )
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether it is a checkpoint, and all of one."""
    try:
        read_manifest(folder)
    except MissingFilesError:
        return False
    except TrainingError:  # of another version
        return True
    return True


def complete_ones(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The complete checkpoints inside a folder that this version reads, the one that was written last first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.name.startswith("."):
            with contextlib.suppress(MissingFilesError, TrainingError):
                found.append((path, read_manifest(path)))
    return sorted(found, key=lambda each: int(each[1]["written_ns"]), reverse=True)


def prune(folder: Path, run_id: str, keep: int) -> None:
    """Removes this run's checkpoints in a folder but for the newest ones."""
    own = [path for path, manifest in complete_ones(folder) if manifest["run"] == run_id]
    for path in own[keep:]:
        dying = path.with_name(f".{path.name}.removing")  # never half a checkpoint under its own name
        shutil.rmtree(dying, ignore_errors=True)  # of a run that was killed
        os.replace(path, dying)
        shutil.rmtree(dying)


def put(staging: Path, folder: Path) -> None:
    """In one step: what was there before is whole until the new one is."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(staging, folder)
    else:
        _exchange(staging, folder)
        shutil.rmtree(staging)
    sync(folder.parent)


def _exchange(one: Path, other: Path) -> None:
    """Linux's renameat2, which swaps two names."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None or renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        # A file system that cannot swap: what is moved aside keeps a name under which it is found.
        aside = other.with_name(f"{other.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(other, aside)
        os.replace(one, other)
        os.replace(aside, one)
