"""Where bytes are, without the bytes: tensors in files, and how a parameter is put together from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["AWAY", "Conversion", "Extent", "Source", "TensorSpec"]

AWAY = "away:"
"""What the file of a tensor begins with whose bytes are not here: it can be planned for, and not read."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint file: contiguous, row-major, little-endian.

    Attributes:
        name: its key in the checkpoint.
        dtype: as stored.
        shape: as stored; ``()`` for a scalar.
        file: absolute path of the file that holds it.
        offset: first byte, from the start of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that stand, as they are, somewhere in a parameter.

    Attributes:
        file: absolute path.
        offset: first byte in the file.
        nbytes: how many, > 0.
        into: first byte in the parameter (row-major, in its stored dtype).
    """

    file: str
    offset: int
    nbytes: int
    into: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """Arithmetic or a transpose between the file and the parameter (placing ranges is not a conversion).

    Attributes:
        inputs: the tensors that it reads.
        run: takes ``{spec.name: CPU tensor as stored}`` and returns ``{parameter name: CPU tensor}`` for ALL of `outputs`.
        outputs: the parameters that one run gives; run once, use for each.
        recipe: a digest of what `run` does, for caches of what it gives.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """How one parameter (or persistent buffer) of the model gets its bytes.

    Exactly one of `extents` and `conversion` is set (an empty tensor has neither).

    Attributes:
        name: the parameter's fully qualified name; for a tied parameter, its first name.
        dtype: the dtype that it has in the model.
        shape: its shape in the model.
        stored_dtype: the dtype of the extents' bytes; differs from `dtype` where a cast is needed.
        extents: cover every byte of the parameter in `stored_dtype` once, ordered by `into`.
        conversion: see Conversion; its result still gets cast to `dtype`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    extents: tuple[Extent, ...] = ()
    conversion: Conversion | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as they rest in the model, in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_view(self) -> bool:
        """Whether a map of the file can show the parameter: one range, no cast, at an offset that its dtype can view."""
        return (
            self.conversion is None
            and self.dtype == self.stored_dtype
            and len(self.extents) == 1
            and self.extents[0].offset % self.dtype.itemsize == 0
        )
