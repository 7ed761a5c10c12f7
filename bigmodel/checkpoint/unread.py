"""A checkpoint that is known without its weight files: by a repo's headers, or by its config.json alone. For plans."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigmodel.checkpoint.checkpoint import Checkpoint, fingerprint_of
from bigmodel.checkpoint.header import checked_entries
from bigmodel.checkpoint.hub import headers_in_repo
from bigmodel.checkpoint.names import leaves
from bigmodel.checkpoint.resolve import has_weights, read_config
from bigmodel.checkpoint.spec import AWAY, TensorSpec
from bigmodel.errors import InvalidArgumentError

__all__ = ["open_unread"]


def open_unread(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
) -> Checkpoint | None:
    """What is known of a checkpoint whose weights are not here; None where they are, or where `open_checkpoint` must say why not.

    Args:
        path: a Hub repo id, of which the headers are asked for; or a folder (or its config.json) without any weights: such
            a checkpoint has no tensors.
        revision, subfolder, variant: as in `open_checkpoint`.

    Raises:
        InvalidArgumentError: `path` is no path.
        MissingFilesError, MalformedFileError, UnsafeFileError, UnsupportedCheckpointError: as there; the last also for a repo
            whose weights are not safetensors, and not in the Hub's cache.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(
            f"The checkpoint's path is {path!r}, of type {type(path).__name__}. Give a folder, a weight file, an index file, "
            "or a Hub repo id such as 'org/name'."
        )
    name = os.path.expanduser(os.fsdecode(path))
    if subfolder is not None and leaves(subfolder):
        return None
    if os.path.lexists(name):
        is_config = os.path.basename(name) == "config.json" and os.path.isfile(name) and subfolder is None
        base = os.path.dirname(os.path.abspath(name)) if is_config else os.path.abspath(name)
        folder = os.path.normpath(os.path.join(base, subfolder or ""))
        if revision is not None or variant is not None or not os.path.isdir(folder) or has_weights(folder):
            return None
        config = read_config(folder)
        return None if config is None else _checkpoint(folder, {}, None, config)
    found = headers_in_repo(path, revision=revision, subfolder=subfolder, variant=variant)
    if found is None:
        return None
    folder, tables, weight_map = found
    contents = {}
    for file, table in tables.items():
        entries, _ = checked_entries(table, file)
        place = f"{AWAY}{os.path.join(folder, file)}"
        contents[file] = [TensorSpec(name, dtype, shape, place, begin) for begin, name, dtype, shape in entries]
    return _checkpoint(folder, contents, weight_map, read_config(folder))


def _checkpoint(
    folder: str,
    contents: Mapping[str, Sequence[TensorSpec]],
    weight_map: Mapping[str, str] | None,
    config: dict[str, object] | None,
) -> Checkpoint:
    """Of what each file holds, by its name as seen from the folder, in order of names."""
    return Checkpoint(
        path=Path(folder),
        files=tuple(f"{AWAY}{os.path.join(folder, file)}" for file in contents),
        tensors={
            spec.name: spec
            for file, specs in contents.items()
            for spec in specs
            if weight_map is None or weight_map.get(spec.name, file) == file  # else a copy: another file's counts
        },
        config=config,
        fingerprint=fingerprint_of(contents) if contents else "",
        content_key="",
        stamps={},
        tied=(),
    )
