"""Names of weight files and indexes: which are meant among a folder's, and which an index names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping

from bigmodel.checkpoint.header import open_regular, parse_json
from bigmodel.checkpoint.pickled import PICKLE_SUFFIXES
from bigmodel.errors import MalformedFileError, UnsafeFileError, UnsupportedCheckpointError, join_some

__all__ = [
    "INDEX",
    "SINGLE_FILES",
    "WEIGHT_SUFFIXES",
    "choose",
    "files_of_index",
    "leaves",
    "read_index",
    "read_small",
    "with_variant",
]

SINGLE_FILES = (  # in order of preference; each may also be split, with an index
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
MAX_JSON_BYTES = 100_000_000
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\.\w+)")
INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


def leaves(name: str) -> bool:
    """Whether a relative file name, read as on any system, leads out of its folder."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name) is not None


def choose(names: Collection[str], variant: str | None) -> list[str]:
    """The weight file, index, or files of a split without an index, among a folder's names; [] if none is meant."""
    for single in SINGLE_FILES:
        for name in (with_variant(single, variant), with_variant(f"{single}.index.json", variant)):
            if name in names:
                return [name]
    if variant is not None:
        names = [name for name in names if f".{variant}." in name or f".{variant}-" in name]
    indexes = [name for name in names if INDEX.fullmatch(name)]
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


def with_variant(name: str, variant: str | None) -> str:
    """``model.safetensors`` -> ``model.fp16.safetensors``; an index becomes ``model.safetensors.index.fp16.json``."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.{variant}{suffix}" if variant else name


def read_index(file: str) -> dict[str, str]:
    index = parse_json(read_small(file), file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFileError(f"{file} is not an index: it has no weight_map of tensor names to file names.")
    wrong = [tensor for tensor, name in weight_map.items() if not isinstance(name, str) or not name or "\0" in name]
    if wrong:
        raise MalformedFileError(f"{file} names no file for {len(wrong)} tensors: {join_some(map(ascii, wrong))}.")
    return weight_map


def files_of_index(index: str, weight_map: Mapping[str, str]) -> list[str]:
    """The files that an index names, once each, as they stand in it."""
    names = sorted(set(weight_map.values()))
    unsafe = [name for name in names if leaves(name)]
    if unsafe:
        raise UnsafeFileError(
            f"{index} names {len(unsafe)} of {len(names)} files outside its folder: {join_some(map(ascii, unsafe))}. "
            "The checkpoint is not read."
        )
    strange = [name for name in names if not name.endswith(WEIGHT_SUFFIXES)]
    if strange:
        raise UnsupportedCheckpointError(
            f"{index} names files of formats that are not read: {join_some(map(ascii, strange))}."
        )
    return names


def read_small(file: str) -> bytes:
    descriptor, status = open_regular(file)
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size > MAX_JSON_BYTES:
            raise MalformedFileError(f"{file} has {status.st_size} bytes; at most {MAX_JSON_BYTES} are allowed.")
        return stream.read()
