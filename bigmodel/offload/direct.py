"""Single tensors, read now, by the thread that asks: for conversions, and for weights that are used at rest."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from bigmodel.checkpoint.spec import Source, TensorSpec
from bigmodel.errors import ReadError
from bigmodel.offload.converted import run_conversion
from bigmodel.offload.reader import FileStamp

__all__ = ["DirectReads"]


class DirectReads:
    """Reads whole tensors into fresh CPU memory.

    Args:
        stamps: path -> FileStamp as of the load: a file that changed since is an error.
    """

    def __init__(self, stamps: Mapping[str, FileStamp]) -> None:
        self._stamps = stamps

    def stored(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor as it is stored: its own dtype and shape, on the CPU."""
        flat = _bytes_for(spec.nbytes)
        self._into(flat, spec.file, spec.offset)
        return flat.view(spec.dtype).view(spec.shape)

    def parameter(self, source: Source) -> torch.Tensor:
        """A parameter as the model has it: put together, converted and cast."""
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
            FileStamp.check(fd, file, self._stamps)
            memory, done = flat.numpy().data, 0
            while done < len(memory):
                count = os.preadv(fd, [memory[done:]], offset + done)
                if count <= 0:
                    raise ReadError(
                        f"{file} ends at byte {offset + done}, and {len(memory) - done} more bytes are needed."
                    )
                done += count
        finally:
            os.close(fd)


def _bytes_for(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
