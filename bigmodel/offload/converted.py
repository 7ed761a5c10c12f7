"""Weights that need arithmetic or a transpose before they can stream: converted once, kept in a cache file.

The cache is a safetensors file named after the checkpoint's bytes and the conversion's outcome, so that another
checkpoint's, or a changed one's, is never used. It is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bigmodel.checkpoint.spec import Conversion, Extent, Source, TensorSpec
from bigmodel.errors import DoesNotFitError
from bigmodel.units import format_bytes

__all__ = ["cached_conversions", "run_conversion"]

logger = logging.getLogger("bigmodel.offload")

_HEADER_ALIGN_BYTES = 4096


def run_conversion(conversion: Conversion, read: Callable[[TensorSpec], torch.Tensor]) -> dict[str, torch.Tensor]:
    """All outputs of one conversion, on the CPU, contiguous, in the dtype that it gives them."""
    with torch.inference_mode(False), torch.no_grad():
        outputs = conversion.run({spec.name: read(spec) for spec in conversion.inputs})
        return {name: outputs[name].contiguous() for name in conversion.outputs}


def cached_conversions(
    sources: Sequence[Source],
    read: Callable[[TensorSpec], torch.Tensor],
    *,
    folder: Path,
    content_key: str,
    limit_bytes: int,
) -> dict[str, Source]:
    """Sources that read the converted bytes from a cache file, which is written if it is not there.

    Args:
        sources: those with a conversion.
        read: gives a stored tensor on the CPU.
        folder: where cache files are.
        content_key: identifies the checkpoint's bytes.
        limit_bytes: the disk tier's limit.

    Returns:
        Parameter name -> a source without a conversion.

    Raises:
        DoesNotFitError: the file would be larger than `limit_bytes`, or than what is free in `folder`.
    """
    by_name = {source.name: source for source in sources}
    described = [
        [name, str(s.dtype), list(s.shape), [i.name for i in s.conversion.inputs]]
        for name, s in by_name.items()
        if s.conversion
    ]
    libraries = [torch.__version__, importlib.metadata.version("transformers")]
    key = hashlib.sha256(json.dumps([content_key, libraries, sorted(described)]).encode()).hexdigest()[:32]
    path = folder / f"converted-{key}.safetensors"
    header, starts, size = _header(sources)
    if not _is_whole(path, header, size):
        _refuse_too_large(folder, size, limit_bytes)
        _write(path, header, starts, by_name, read)
        logger.info("wrote %s of converted weights to %s", format_bytes(size), path)
    return {
        name: Source(
            name, source.dtype, source.shape, source.dtype, (Extent(str(path), starts[name], source.nbytes, 0),)
        )
        for name, source in by_name.items()
    }


def _header(sources: Sequence[Source]) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header, each tensor's first byte in the file, and the file's size."""
    names = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}
    entries: dict[str, object] = {}
    at = 0
    for source in sources:
        dtype = names.get(source.dtype) or ("F" if source.dtype.is_floating_point else "I") + str(
            8 * source.dtype.itemsize
        )
        entries[source.name] = {"dtype": dtype, "shape": list(source.shape), "data_offsets": [at, at + source.nbytes]}
        at += source.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGN_BYTES)
    data = 8 + len(text)
    starts = {name: data + entry["data_offsets"][0] for name, entry in entries.items()}  # type: ignore[index]
    return len(text).to_bytes(8, "little") + text, starts, data + at


def _is_whole(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _refuse_too_large(folder: Path, size: int, limit_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stat = os.statvfs(folder)
    available = min(limit_bytes, stat.f_bavail * stat.f_frsize)
    if size > available:
        raise DoesNotFitError(
            f"Weights that need conversion take {format_bytes(size)} of disk in {folder}, and {format_bytes(available)} may be "
            "used. Raise max_memory['disk'], free some space, or give another offload_folder.",
            tier="disk",
            needed_bytes=size,
            available_bytes=available,
        )


def _write(
    path: Path,
    header: bytes,
    starts: Mapping[str, int],
    sources: Mapping[str, Source],
    read: Callable[[TensorSpec], torch.Tensor],
) -> None:
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(header)
            written: set[str] = set()
            for source in sources.values():
                if source.name in written or source.conversion is None:
                    continue
                outputs = run_conversion(source.conversion, read)
                for name, tensor in outputs.items():
                    if name in sources and name not in written:
                        raw = tensor.to(sources[name].dtype).reshape(-1).view(torch.uint8)
                        file.seek(starts[name])
                        file.write(raw.numpy().data)
                        written.add(name)
                del outputs
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
