"""torch.save files (.bin, .pt, .pth): byte ranges of their tensors, found without running code or reading data.

A file of today's format is a zip archive with the tensors' storages stored as they are. Its pickle is read weights-only
onto the meta device, from a small copy of the archive in which every storage is empty: what comes back says, for each
tensor, which storage it lies in and where. The true archive's own directory says where that storage is in the file, so
nothing has to be believed. What cannot be shown as one range (a transposed tensor; a compressed, big-endian or pre-zip
file) is written once, as safetensors, to a cache.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from bigmodel.checkpoint.header import IncompleteFileError, open_regular
from bigmodel.checkpoint.rewritten import RewriteCache
from bigmodel.checkpoint.spec import TensorSpec
from bigmodel.errors import CheckpointError, MalformedFileError, UnsafeFileError, UnsupportedCheckpointError, join_some

__all__ = ["PICKLE_SUFFIXES", "read_pickle"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_PICKLE_BYTES = 100_000_000  # of the pickle inside, without the data: as for a safetensors header
_ZIP_MARK = b"PK\x03\x04"


def read_pickle(file: str, cache: RewriteCache) -> tuple[TensorSpec, ...]:
    """The tensors of a torch.save file: in `file` itself where they are ranges of it, else in a rewritten copy.

    Args:
        file: absolute path.
        cache: for tensors that are no ranges; untouched without such.

    Returns:
        By file and offset. Tensors that share bytes have equal offsets.

    Raises:
        UnsafeFileError: the pickle would run code; it was not run.
        IncompleteFileError, MalformedFileError: truncated or damaged.
        UnsupportedCheckpointError: sound, but holds no dict of plain tensors.
        DoesNotFitError: the cache's disk is too small for what must be rewritten.
        MissingFilesError, CheckpointError: as `open_regular`.
    """
    descriptor, status = open_regular(file)
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size == 0:
            raise IncompleteFileError(f"{file} has 0 bytes: the download is incomplete.")
        archive = _read_archive(stream, file) if os.pread(descriptor, 4, 0) == _ZIP_MARK else None
    specs: list[TensorSpec] = []
    rewritten: frozenset[str] | None = None  # None: all of them
    if archive is not None:
        skeleton, keys = archive.skeleton()
        weights = _weights_of(_load(skeleton, file, archive.pickle, map_location="meta"), file)
    if archive is not None and archive.is_plain:
        ranges = {name: _range_in_file(name, tensor, archive, keys, file) for name, tensor in weights.items()}
        specs = [spec for spec in ranges.values() if spec is not None]
        rewritten = frozenset(name for name, spec in ranges.items() if spec is None)
    if rewritten is None or rewritten:
        # A plain archive is mapped, and one tensor at a time is in memory. The others have to be read whole.
        is_plain = rewritten is not None

        def load() -> dict[str, torch.Tensor]:
            weights = _weights_of(_load(file, file, None, map_location="cpu", mmap=is_plain), file)
            if empty := [f"{name!a}" for name, tensor in weights.items() if tensor.is_meta]:
                raise UnsupportedCheckpointError(
                    f"{file} holds no data of {len(empty)} tensors, saved from the meta device: {join_some(empty)}."
                )
            return weights

        specs += cache.specs(file, rewritten, load)
    return tuple(sorted(specs, key=lambda spec: (spec.file != file, spec.offset)))


@dataclass(frozen=True, slots=True)
class _Record:
    """A storage in the archive: its bytes in the file, and whether they stand there as they are."""

    offset: int
    nbytes: int
    is_stored: bool


@dataclass(frozen=True, slots=True)
class _Archive:
    """A torch.save zip archive: its pickle, and where its storages are, by the key that the pickle gives them."""

    pickle: bytes
    records: Mapping[str, _Record]
    is_little_endian: bool

    @property
    def is_plain(self) -> bool:
        return self.is_little_endian and all(record.is_stored for record in self.records.values())

    def skeleton(self) -> tuple[IO[bytes], dict[int, str]]:
        """The archive with empty storages, for torch.load, and the key of the storage at each of its offsets."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as small:
            small.writestr("a/data.pkl", self.pickle)
            small.writestr("a/version", b"3\n")
            for key in self.records:
                small.writestr(f"a/data/{key}", b"")
            infos = [info for info in small.infolist() if info.filename.startswith("a/data/")]
        keys = {_data_offset(stream, info): info.filename.removeprefix("a/data/") for info in infos}
        stream.seek(0)
        return stream, keys


def _read_archive(stream: IO[bytes], file: str) -> _Archive:
    size = os.fstat(stream.fileno()).st_size
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            root = infos[0].filename.partition("/")[0] if infos else ""
            members = {info.filename.removeprefix(f"{root}/"): info for info in infos}
            if len(members) != len(infos):
                raise MalformedFileError(f"{file} is a zip archive that names a member twice.")
            if "constants.pkl" in members:
                raise UnsafeFileError(
                    f"{file} is a TorchScript archive, which holds code. Save its state_dict() instead."
                )
            if "data.pkl" not in members:
                raise UnsupportedCheckpointError(f"{file} is a zip archive without data.pkl, so not from torch.save.")
            if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
                raise MalformedFileError(
                    f"{file} holds a pickle of {members['data.pkl'].file_size} bytes; {MAX_PICKLE_BYTES} are allowed."
                )
            records = {
                name.removeprefix("data/"): _Record(
                    _data_offset(stream, info),
                    info.file_size,
                    info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size,
                )
                for name, info in members.items()
                if name.startswith("data/") and not info.is_dir()
            }
            byteorder = archive.open(members["byteorder"]).read(16) if "byteorder" in members else b"little"
            content = archive.read(members["data.pkl"])
    except zipfile.BadZipFile as error:
        raise IncompleteFileError(
            f"{file} has {size} bytes and no sound zip directory ({error}): incomplete download, or a damaged file."
        ) from None
    except (OSError, EOFError, RuntimeError, NotImplementedError, ValueError, zlib.error) as error:
        raise MalformedFileError(f"{file} is a damaged zip archive: {error}.") from None
    position = 0
    for key, record in sorted(records.items(), key=lambda item: item[1].offset):
        if record.is_stored and (record.offset < position or record.offset + record.nbytes > size):
            raise MalformedFileError(
                f"{file} has storage {key!a} at bytes {record.offset} to {record.offset + record.nbytes}: out of its "
                f"{size} bytes, or over the storage before it, which ends at {position}."
            )
        position = record.offset + (record.nbytes if record.is_stored else 0)
    return _Archive(content, records, byteorder == b"little")


def _data_offset(stream: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose length may differ from that in the directory."""
    stream.seek(info.header_offset)
    local = stream.read(30)
    if len(local) < 30 or not local.startswith(_ZIP_MARK):
        raise zipfile.BadZipFile(f"no member {info.filename!a} at byte {info.header_offset}")
    return info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")


def _load(source: IO[bytes] | str, file: str, content: bytes | None, **options: Any) -> Any:
    """torch.load, weights only, with its errors made ours; `content` is the pickle itself where it is known."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about pickle protocols and storage classes: nothing that a user can act on
            return torch.load(source, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise _refusal(error, file, content) from None
    except Exception as error:
        if "weights_only" in str(error):  # the tar format of 2017: torch itself refuses it
            raise UnsupportedCheckpointError(
                f"{file} is in a format that cannot be read weights-only. Save its state_dict() with torch.save again."
            ) from None
        raise MalformedFileError(
            f"{file} is damaged, or not from torch.save: {type(error).__name__}: {ascii(str(error))[1:200]}."
        ) from None


def _refusal(error: pickle.UnpicklingError, file: str, content: bytes | None) -> CheckpointError:
    """Why the weights-only reader stopped: code, an instruction that it does not know, or no pickle at all."""
    cause = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    names = re.findall(r"GLOBAL (\S+)", str(cause))
    protocol: int | None = None
    if not names:
        with open(file, "rb") if content is None else io.BytesIO(content) as stream:
            protocol, names = _foreign_globals(stream)
    if names:
        return UnsafeFileError(
            f"{file} holds code: its pickle calls {join_some(map(ascii, names))}, which is no weight. It was not run. "
            "Use the model's safetensors files, or, if the file can be trusted, save its state_dict() alone."
        )
    if protocol is None:
        return MalformedFileError(f"{file} is neither a zip archive nor a pickle of torch.save.")
    if protocol != 2:
        return UnsupportedCheckpointError(
            f"{file} is a pickle of protocol {protocol}, and weights-only reading knows 2. Save it again."
        )
    return UnsafeFileError(f"{file} is refused by weights-only reading: {ascii(str(cause))[1:200]}.")


def _foreign_globals(stream: IO[bytes]) -> tuple[int | None, list[str]]:
    """The protocol (None: not a pickle) and the names that a pickle would import from outside torch; nothing is run."""
    protocol: int | None = None
    names: list[str] = []
    for operation, argument, texts in _operations(stream):
        if operation == "PROTO" and protocol is None:
            protocol = argument
        elif operation in ("GLOBAL", "INST"):
            names.append(argument.replace(" ", "."))
        elif operation == "STACK_GLOBAL":
            names.append(".".join(texts[-2:]))
    own = ("torch", "collections", "_codecs")
    return protocol, sorted({name for name in names if name.partition(".")[0] not in own})


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any, list[str]]]:
    """A pickle's instructions, as far as they can be told, with the texts pushed so far."""
    texts: list[str] = []
    memo: dict[object, str | None] = {}
    last: str | None = None
    try:
        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            if name == "MEMOIZE":
                memo[len(memo)] = last
            elif name.endswith("PUT"):
                memo[argument] = last
            else:
                last = argument if isinstance(argument, str) else None
                if name.endswith("GET"):
                    last = memo.get(argument)
                if last is not None:
                    texts.append(last)
            yield name, argument, texts
    except Exception:  # genops raises whatever the damage leads it to; what came before it counts
        return


def _weights_of(loaded: object, file: str) -> dict[str, torch.Tensor]:
    """The one dict of tensors in what a file held: the object itself, or one of its entries. The rest is dropped."""
    if not isinstance(loaded, Mapping):
        raise UnsupportedCheckpointError(f"{file} holds a {type(loaded).__name__}, not a dict of weights by name.")
    found = {"": _tensors_in(loaded)} | {
        key: _tensors_in(value) for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Mapping)
    }
    found = {key: tensors for key, tensors in found.items() if tensors}
    if not found:
        raise UnsupportedCheckpointError(
            f"{file} holds no weights: its entries are {join_some(map(ascii, loaded)) or 'none'}. "
            "Expected tensors by name, or one dict of them."
        )
    if len(found) > 1:
        parts = (
            f"{len(tensors)} in {key!a}" if key else f"{len(tensors)} at its top" for key, tensors in found.items()
        )
        raise UnsupportedCheckpointError(
            f"{file} holds tensors in {len(found)} dicts ({join_some(parts)}); which are the weights is not clear. "
            "Save the wanted one alone with torch.save."
        )
    tensors = next(iter(found.values()))
    strange = [f"{name!a} ({kind})" for name, tensor in tensors.items() if (kind := _strangeness(tensor))]
    if strange:
        raise UnsupportedCheckpointError(f"{file} holds tensors that are not plain: {join_some(strange)}.")
    return tensors


def _strangeness(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being plain bytes with a dtype and a shape; empty if nothing does."""
    if tensor.is_quantized:
        return str(tensor.dtype)
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return "" if type(tensor) in (torch.Tensor, torch.nn.Parameter) else type(tensor).__name__


def _tensors_in(table: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _range_in_file(
    name: str, tensor: torch.Tensor, archive: _Archive, keys: Mapping[int, str], file: str
) -> TensorSpec | None:
    """Where a meta tensor's bytes are in the true file; None if they are no single range of it."""
    key = keys.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1)
    if key is None or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    record = archive.records[key]
    begin = int(tensor.storage_offset()) * tensor.dtype.itemsize
    end = begin + tensor.numel() * tensor.dtype.itemsize
    if tensor.numel() and end > record.nbytes:
        raise MalformedFileError(
            f"{file}: {name!a} needs bytes {begin} to {end} of storage {key!a}, which has {record.nbytes}."
        )
    return TensorSpec(name, tensor.dtype, tuple(tensor.shape), file, record.offset + begin)
