"""Weights that need arithmetic or a transpose before they can stream: converted once, kept in a cache file.

The cache is a safetensors file named after the checkpoint's bytes and the conversion's outcome, so that another
checkpoint's, or a changed one's, is never used. It is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from bigmodel.allowance import DiskAllowance
from bigmodel.checkpoint.header import encode_header
from bigmodel.checkpoint.rewritten import written_whole
from bigmodel.checkpoint.spec import Conversion, Extent, Source, TensorSpec
from bigmodel.offload.spill import trim_heap
from bigmodel.progress import Report
from bigmodel.units import format_bytes

__all__ = ["cached_conversions", "run_conversion"]

logger = logging.getLogger("bigmodel.offload")


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
    allowance: DiskAllowance,
    progress: Report | None = None,
) -> dict[str, Source]:
    """Sources that read the converted bytes from a cache file, which is written if it is not there.

    Args:
        sources: those with a conversion.
        read: gives a stored tensor on the CPU.
        folder: where cache files are.
        content_key: identifies the checkpoint's bytes.
        allowance: what may be written.
        progress: called with (phase, done bytes, total bytes).

    Returns:
        Parameter name -> a source without a conversion.

    Raises:
        DoesNotFitError: the file would be larger than what may be written, or than what is free in `folder`.
    """
    by_name = {source.name: source for source in sources}
    described = [
        [name, str(s.dtype), list(s.shape), [i.name for i in s.conversion.inputs], s.conversion.recipe]
        for name, s in by_name.items()
        if s.conversion
    ]
    libraries = [torch.__version__, importlib.metadata.version("transformers")]
    key = hashlib.sha256(json.dumps([content_key, libraries, sorted(described)]).encode()).hexdigest()[:32]
    path = folder / f"converted-{key}.safetensors"
    header, starts, size = _header(sources, key)
    if not _is_whole(path, header, size):
        with written_whole(path, size, allowance, "The copy of weights that need conversion") as file:
            file.write(header)
            _write(file, starts, by_name, read, progress)
        logger.info("wrote %s of converted weights to %s", format_bytes(size), path)
    return {
        name: Source(
            name, source.dtype, source.shape, source.dtype, (Extent(str(path), starts[name], source.nbytes, 0),)
        )
        for name, source in by_name.items()
    }


def _header(sources: Sequence[Source], key: str) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header, each tensor's first byte in the file, and the file's size."""
    # Wide dtypes first: each then begins where its dtype can view it.
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    entries = ((source.name, source.dtype, tuple(source.shape)) for source in ordered)
    header = encode_header(entries, {"format": "pt", "bigmodel_key": key})
    starts, at = {}, len(header)
    for source in ordered:
        starts[source.name] = at
        at += source.nbytes
    return header, starts, at


def _is_whole(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _write(
    file: BinaryIO,
    starts: Mapping[str, int],
    sources: Mapping[str, Source],
    read: Callable[[TensorSpec], torch.Tensor],
    progress: Report | None,
) -> None:
    total, written = sum(source.nbytes for source in sources.values()), dict[str, int]()
    for source in sources.values():
        if source.name in written or source.conversion is None:
            continue
        outputs = run_conversion(source.conversion, read)
        for name, tensor in outputs.items():
            if name in sources and name not in written:
                raw = tensor.to(sources[name].dtype).reshape(-1).view(torch.uint8)
                file.seek(starts[name])
                file.write(raw.numpy().data)
                written[name] = raw.numel()
        del outputs, tensor, raw
        trim_heap()
        if progress is not None:
            progress("converting weights", sum(written.values()), total)
