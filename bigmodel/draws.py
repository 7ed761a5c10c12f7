"""Random generators of the host, kept as they are around what draws."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["draws_kept"]


@contextlib.contextmanager
def draws_kept() -> Iterator[None]:
    """Random generators of the host go on afterwards where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
