"""The safetensors header: where each tensor of a file is, checked against the file before anything is read from it.

A file is an 8-byte little-endian length N, N bytes of JSON, then the tensors' bytes without a gap::

    {"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmodel.checkpoint.spec import TensorSpec
from bigmodel.errors import (
    CheckpointError,
    MalformedFileError,
    MissingFilesError,
    UnsupportedCheckpointError,
    join_some,
)

__all__ = [
    "Header",
    "IncompleteFileError",
    "checked_entries",
    "encode_header",
    "open_regular",
    "parse_json",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_FIRST_READ_BYTES = 64 << 10  # holds the whole header of most files: one read each
_DATA_ALIGN_BYTES = 4096  # of files that we write: O_DIRECT can read their tensors in place
_MAX_DIM = 2**63 - 1
_LFS_MARK = b"version https://git-lfs"

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # what is not whole bytes; the rest is the dtype's itemsize
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,  # two to a byte: torch counts the bytes, the header counts the values
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class IncompleteFileError(MalformedFileError):
    """A file that was not fetched whole: truncated, empty, or a git-lfs pointer. Fetching it again mends it."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself, after all of it was checked.

    Attributes:
        tensors: in file order.
        metadata: the writer's own strings.
    """

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]


def open_regular(file: str) -> tuple[int, os.stat_result]:
    """A descriptor of a regular file, and its stat. Never waits, as `open` would on a FIFO.

    Raises:
        MissingFilesError: it is not there (or a link to nothing).
        MalformedFileError: it is a folder, FIFO, socket or device.
        IncompleteFileError: it is a git-lfs pointer in place of the file.
        CheckpointError: the system refuses to open it.
    """
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "FIFO" if stat.S_ISFIFO(mode) else "device or socket"
            raise MalformedFileError(f"{file} is a {kind}, not a regular file. Put the checkpoint's file there.")
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingFilesError(f"{file} does not exist.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened: {error.strerror}.") from None
    try:
        start = os.pread(descriptor, 512, 0)
        if start.startswith(_LFS_MARK):
            raise IncompleteFileError(f"{file} is a git-lfs pointer{_pointed_size(start)}, not the file itself.")
        return descriptor, os.fstat(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def read_header(file: str) -> Header:
    """The tensors of a safetensors file, from its header alone; every claim is checked against the file's size.

    Args:
        file: absolute path.

    Raises:
        IncompleteFileError: the file is shorter than its header says.
        MalformedFileError: the header contradicts itself, the file or the format; all contradictions are listed.
        UnsupportedCheckpointError: a dtype of the format that torch does not have.
        MissingFilesError, CheckpointError: as `open_regular`.
    """
    descriptor, status = open_regular(file)
    try:
        raw, length = _read_raw(descriptor, status.st_size, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    finally:
        os.close(descriptor)
    table = parse_json(raw, f"{file} has a header that")
    if not isinstance(table, dict):
        raise MalformedFileError(f"{file} has a header that is a JSON {type(table).__name__}, not an object.")
    metadata = table.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedFileError(f"{file} has __metadata__ that is not an object of strings.")
    start = 8 + length
    entries, end = checked_entries(table, file)
    if start + end > status.st_size:
        raise IncompleteFileError(f"{file} has {status.st_size} of {start + end} bytes: the download is incomplete.")
    if start + end < status.st_size:
        raise MalformedFileError(f"{file} has {status.st_size} bytes, and its tensors end at byte {start + end}.")
    return Header(
        tuple(TensorSpec(name, dtype, shape, file, start + begin) for begin, name, dtype, shape in entries), metadata
    )


def encode_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file whose tensors follow in the given order, each contiguous, without gaps.

    Args:
        tensors: name, dtype and shape (as torch counts it) of each.
        metadata: strings to keep with them.

    Returns:
        Length and JSON, padded so that the first tensor starts at a multiple of 4096 bytes.

    Raises:
        UnsupportedCheckpointError: the format has no name for a dtype.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        if dtype not in _NAMES:
            raise UnsupportedCheckpointError(
                f"{name!a} is {dtype}, for which safetensors has no name. Convert it first."
            )
        end = begin + math.prod(shape) * dtype.itemsize
        stated = [*shape[:-1], shape[-1] * 2] if _NAMES[dtype] == "F4" and shape else list(shape)
        table[name] = {"dtype": _NAMES[dtype], "shape": stated, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


def parse_json(raw: bytes, subject: str) -> Any:
    """JSON as the formats mean it: UTF-8, no key twice, no NaN.

    Args:
        raw: the text.
        subject: begins the error, such as ``"a.json"``.

    Raises:
        MalformedFileError: it is not.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedFileError(f"{subject} is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise MalformedFileError(f"{subject} is not valid JSON: {ascii(str(error))[1:-1]}.") from None


def _read_raw(descriptor: int, size: int, file: str) -> tuple[bytes, int]:
    first = os.pread(descriptor, _FIRST_READ_BYTES, 0)
    if len(first) < 8:
        raise IncompleteFileError(f"{file} has {size} of at least 8 bytes: the download is incomplete.")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        hint = " It is a zip archive: a torch.save file is named .bin or .pt." if first[:4] == b"PK\x03\x04" else ""
        raise MalformedFileError(
            f"{file} states a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed.{hint}"
        )
    if 8 + length > size:
        raise IncompleteFileError(
            f"{file} has {size} of at least {8 + length} bytes (its header's end): the download is incomplete."
        )
    raw = bytearray(first[8 : 8 + length])
    while len(raw) < length:
        part = os.pread(descriptor, length - len(raw), 8 + len(raw))
        if not part:
            raise IncompleteFileError(f"{file} became shorter while it was read.")
        raw += part
    return bytes(raw), length


_Entry = tuple[int, str, torch.dtype, tuple[int, ...]]


def checked_entries(table: dict[str, Any], file: str) -> tuple[list[_Entry], int]:
    """(begin, name, dtype, shape) by begin, and where the last tensor ends; begins count from the end of the header.

    Args:
        table: name -> {"dtype", "shape", "data_offsets"}, as a header says it.
        file: for errors.
    """
    problems: list[str] = []
    no_dtype: list[str] = []
    ranges: list[tuple[int, int, str]] = []
    entries: list[_Entry] = []
    for name, entry in table.items():
        try:
            name.encode()
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            problems.append(f"{name!a} is not an object of dtype, shape and two data_offsets")
            continue
        if not isinstance(kind, str) or (kind not in _DTYPES and kind not in _BITS):
            problems.append(f"{name!a} has the unknown dtype {kind!a}")
            continue
        if not isinstance(shape, list) or not all(type(dim) is int and 0 <= dim <= _MAX_DIM for dim in shape):
            problems.append(f"{name!a} has the shape {shape!a}, which is not a list of sizes")
            continue
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            problems.append(f"{name!a} has the data_offsets [{begin!a}, {end!a}], which are not a range")
            continue
        bits = math.prod(shape) * (_BITS.get(kind) or _DTYPES[kind].itemsize * 8)
        if bits != (end - begin) * 8:
            needed = bits // 8 if bits % 8 == 0 else bits / 8
            problems.append(f"{name!a} is {kind} {shape}, {needed} bytes, and its data_offsets hold {end - begin}")
            continue
        ranges.append((begin, end, name))
        if kind not in _DTYPES:
            no_dtype.append(f"{name!a} is {kind}")
        elif kind == "F4" and (not shape or shape[-1] % 2):
            no_dtype.append(f"{name!a} is F4 {shape}, whose last size is odd")
        else:
            sizes = (*shape[:-1], shape[-1] // 2) if kind == "F4" else tuple(shape)
            entries.append((begin, name, _DTYPES[kind], sizes))
    ranges.sort()
    position = 0
    if not problems:  # a tensor left out above would look like a hole
        for begin, end, name in ranges:
            if begin != position:
                fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
                problems.append(f"{name!a} begins at byte {begin}, not {position}: it {fault}")
            position = max(position, end)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise MalformedFileError(f"{file} has {count} in its header: {join_some(problems, separator='; ')}.")
    if no_dtype:
        raise UnsupportedCheckpointError(f"{file} holds tensors that torch has no dtype for: {join_some(no_dtype)}.")
    entries.sort(key=lambda entry: entry[0])
    return entries, position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!a} stands in it twice")
    return table


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _pointed_size(pointer: bytes) -> str:
    for line in pointer.decode("ascii", "replace").splitlines():
        key, _, value = line.partition(" ")
        if key == "size" and value.isdigit():
            return f" to {value} bytes"
    return ""
