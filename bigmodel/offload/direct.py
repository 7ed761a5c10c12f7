"""Single tensors, read now, by the thread that asks: for conversions, and for weights that are used at rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from bigmodel.checkpoint.spec import Source, TensorSpec
from bigmodel.checkpoint.stamp import FileStamp
from bigmodel.errors import ReadError, WeightNotResidentError
from bigmodel.offload.converted import run_conversion
from bigmodel.offload.reader import check_stamp, read_fully
from bigmodel.units import format_bytes

__all__ = ["DirectReads"]


class DirectReads:
    """Reads whole tensors into fresh CPU memory.

    Args:
        stamps: path -> FileStamp as of the load: a file that changed since is an error.
        room: says what `parameter` may take now, in bytes; None for no limit.
    """

    def __init__(self, stamps: Mapping[str, FileStamp], *, room: Callable[[], int] | None = None) -> None:
        self._stamps = stamps
        self._room = room

    def stored(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor as it is stored: its own dtype and shape, on the CPU."""
        flat = _bytes_for(spec.nbytes)
        self._into(flat, spec.file, spec.offset)
        return flat.view(spec.dtype).view(spec.shape)

    def parameter(self, source: Source) -> torch.Tensor:
        """A parameter as the model has it: put together, converted and cast.

        Raises:
            WeightNotResidentError: it would take more than the limit.
            ReadError: the bytes are not there any more.
        """
        needed = _needed_bytes(source)
        if self._room is not None and needed > (left := self._room()):
            raise WeightNotResidentError(
                f"{source.name} is used outside its unit's forward: reading it takes {format_bytes(needed)} of memory, and "
                f"{format_bytes(left)} is left of max_memory['cpu']. Raise that limit, or call "
                "bigmodel.materialize(model) to have all weights in memory."
            )
        with torch.inference_mode(False), torch.no_grad():
            if source.conversion is not None:
                value = run_conversion(source.conversion, self.stored)[source.name]
                return value.to(source.dtype).reshape(source.shape)
            flat = _bytes_for(source.nbytes // source.dtype.itemsize * source.stored_dtype.itemsize)
            for extent in source.extents:
                self._into(flat[extent.into : extent.into + extent.nbytes], extent.file, extent.offset)
            return flat.view(source.stored_dtype).view(source.shape).to(source.dtype)

    def _into(self, flat: torch.Tensor, file: str, offset: int) -> None:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ReadError(
                f"{file} could not be opened: {error.strerror}. Put the file back, or load again."
            ) from error
        try:
            check_stamp(fd, file, self._stamps)
            read_fully(fd, flat.numpy().data, offset, flat.numel(), file)
        finally:
            os.close(fd)


def _needed_bytes(source: Source) -> int:
    """The parameter, and what it is made from while it is made."""
    if source.conversion is not None:
        outputs = len(source.conversion.outputs) * source.nbytes
        return sum(spec.nbytes for spec in source.conversion.inputs) + outputs
    if source.stored_dtype != source.dtype:
        return source.nbytes + source.nbytes // source.dtype.itemsize * source.stored_dtype.itemsize
    return source.nbytes


def _bytes_for(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
