"""The cache of tensors that had to be rewritten: safetensors files, each there whole or not at all.

A file's name and metadata hold a key made from the source's real path, size and times. A copy of another file, or of an
older state of this one, has another key and is never met.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint.header import encode_header, read_header
from bigmodel.checkpoint.spec import TensorSpec
from bigmodel.checkpoint.stamp import FileStamp, stamp_key
from bigmodel.errors import CheckpointError
from bigmodel.progress import Report

__all__ = ["RewriteCache", "default_cache_folder", "written_whole"]

logger = logging.getLogger("bigmodel.checkpoint")

_CACHE_VERSION = "1"  # raise it when what is written changes
_WRITE_BYTES = 64 << 20


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/bigmodel``, by default ``~/.cache/bigmodel``; not made here."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "bigmodel"


@dataclass(frozen=True, slots=True)
class RewriteCache:
    """Where tensors that are no ranges of their file are kept as safetensors.

    Attributes:
        folder: made when something is written.
        allowance: what may be written.
        progress: called with (phase, done bytes, total bytes).
    """

    folder: Path = field(default_factory=default_cache_folder)
    allowance: DiskAllowance = field(default_factory=DiskAllowance)
    progress: Report | None = None

    def specs(
        self, file: str, names: frozenset[str] | None, load: Callable[[], dict[str, torch.Tensor]]
    ) -> list[TensorSpec]:
        """Tensors of `file` as ranges of a safetensors file in the cache, which is written if it is not there.

        Args:
            file: absolute path of the source.
            names: which of its tensors; None for all.
            load: gives them (or more), on the CPU. Called only if they must be written.

        Raises:
            DoesNotFitError: more than may be written, or than the disk has free.
            UnsupportedCheckpointError: a dtype that safetensors has no name for.
            CheckpointError: it cannot be written, or `file` changed meanwhile.
        """
        stamp = stamp_key(file, FileStamp.of(file))
        wanted = "all" if names is None else json.dumps(sorted(names))
        key = hashlib.sha256("\0".join([_CACHE_VERSION, stamp, wanted]).encode("utf-8", "surrogateescape")).hexdigest()
        target = self.folder / "rewritten" / f"{key}.safetensors"
        found = _cached(target, key)
        if found is not None:
            return found
        logger.info("%s cannot be streamed as it is: tensors of it are rewritten to %s", file, target)
        weights = {name: tensor for name, tensor in load().items() if names is None or name in names}
        try:
            self._write(file, weights, target, key)
            is_same = stamp_key(file, FileStamp.of(file)) == stamp
            if not is_same:
                target.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{file} has tensors that must be rewritten, and {target.parent} cannot be written: {error.strerror}. "
                "Give another folder, or use the safetensors files of this model."
            ) from None
        found = _cached(target, key) if is_same else None
        if found is None:
            raise CheckpointError(
                f"{file} or its copy {target} changed while it was rewritten. Open the checkpoint again."
            )
        return found

    def _write(self, file: str, weights: Mapping[str, torch.Tensor], target: Path, key: str) -> None:
        """Writes a safetensors file. Equal views of a storage are written once."""
        storages = [tensor.untyped_storage() for tensor in weights.values()]  # kept, so that no id is given twice
        first: dict[tuple[object, ...], str] = {}
        aliases: dict[str, str] = {}
        for (name, tensor), storage in zip(weights.items(), storages, strict=True):
            place = (tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg())
            original = first.setdefault((id(storage), tensor.dtype, tensor.shape, *place), name)
            if original != name:
                aliases[name] = original
        kept = {name: weights[name] for name in first.values()}
        metadata = {"format": "pt", "bigmodel_key": key, "bigmodel_aliases": json.dumps(aliases)}
        header = encode_header(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()), metadata)
        total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in kept.values())
        what = f"The copy of what {os.path.basename(file)} does not hold as plain ranges"
        with written_whole(target, len(header) + total, self.allowance, what) as stream:
            stream.write(header)
            done = 0
            for tensor in kept.values():
                flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                for begin in range(0, flat.numel(), _WRITE_BYTES):
                    done += stream.write(flat[begin : begin + _WRITE_BYTES].numpy().data)
                    if self.progress is not None:
                        self.progress("rewriting weights", done, total)


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


@contextmanager
def written_whole(target: Path, num_bytes: int, allowance: DiskAllowance, what: str) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when the block ends well, and is gone when it does not.

    Args:
        target: its name; the folder is made.
        num_bytes: of it.
        allowance: what may be written; charged with it.
        what: what it is, for errors.

    Raises:
        DoesNotFitError: there is not enough room; nothing was written.
    """
    allowance.take(num_bytes, target.parent, what)
    temporary: str | None = None
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        allowance.give_back(num_bytes)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the name, too, survives a power cut
    finally:
        os.close(folder)
