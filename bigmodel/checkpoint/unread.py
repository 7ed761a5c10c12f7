"""A checkpoint that is known without its weight files: by a repo's headers, or by its config.json alone. For plans."""

from __future__ import annotations

import os
from pathlib import Path

from bigmodel.checkpoint.checkpoint import Checkpoint, fingerprint_of
from bigmodel.checkpoint.header import checked_entries
from bigmodel.checkpoint.resolve import has_weights, headers_in_repo, read_config
from bigmodel.checkpoint.spec import AWAY, TensorSpec

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
        MissingFilesError, MalformedFileError, UnsupportedCheckpointError: as there.
    """
    name = os.path.expanduser(os.fsdecode(path))
    if os.path.basename(name) == "config.json" and os.path.isfile(name):
        name = os.path.dirname(os.path.abspath(name))
    if os.path.isdir(name):
        folder = os.path.normpath(os.path.join(os.path.abspath(name), subfolder or ""))
        if not os.path.isdir(folder) or has_weights(folder) or variant is not None:
            return None
        config = read_config(folder)
        return None if config is None else _checkpoint(folder, (), config)
    found = headers_in_repo(path, revision=revision, subfolder=subfolder, variant=variant)
    if found is None:
        return None
    folder, tables, weight_map = found
    specs = []
    for file, table in tables.items():
        place = f"{AWAY}{os.path.join(folder, file)}"
        entries, _ = checked_entries(table, file)
        for begin, tensor, dtype, shape in entries:
            if weight_map is None or weight_map.get(tensor, file) == file:
                specs.append(TensorSpec(tensor, dtype, shape, place, begin))
    return _checkpoint(folder, sorted(specs, key=lambda spec: (spec.file, spec.offset)), read_config(folder))


def _checkpoint(folder: str, specs: list[TensorSpec] | tuple[()], config: dict[str, object] | None) -> Checkpoint:
    files: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        files.setdefault(spec.file, []).append(spec)
    return Checkpoint(
        path=Path(folder),
        files=tuple(files),
        tensors={spec.name: spec for spec in specs},
        config=config,
        fingerprint=fingerprint_of({os.path.basename(file): own for file, own in files.items()}) if files else "",
        content_key="",
        stamps={},
        tied=(),
    )
