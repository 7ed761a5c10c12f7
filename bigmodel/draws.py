"""Random generators of the host, kept as they are around what draws."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.random import mtrand

__all__ = ["draws_kept"]


_SPARE: list[np.random.MT19937] = []  # of numpy, to draw from inside


@contextlib.contextmanager
def draws_kept() -> Iterator[None]:
    """Random generators of the host go on afterwards where they were.

    What is inside draws from there on too, but for numpy: its state takes 0.1 ms to copy, so another generator stands in, which
    `numpy.random.seed` seeds.
    """
    states = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    spare = _SPARE.pop() if _SPARE else np.random.MT19937(0)
    mtrand.set_bit_generator(spare)
    try:
        yield
    finally:
        random.setstate(states[0])
        mtrand.set_bit_generator(states[1])
        torch.set_rng_state(states[2])
        _SPARE.append(spare)
