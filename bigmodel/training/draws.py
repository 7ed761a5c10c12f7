"""Random generators: seeds from several numbers, states that are saved and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bigmodel.training.processes import Processes

__all__ = ["mixed", "permuted", "random_states", "restore_random", "seed_draws"]

_WORD = (1 << 64) - 1
_NUM_ROUNDS = 8


def mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers, each of 64: rounds of the SplitMix64 generator (Steele et al., 2014), 2 us."""
    state = len(numbers)
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state >> 1


def permuted(places: np.ndarray[Any, Any], length: int, seed: int) -> np.ndarray[Any, Any]:
    """What stands at some places of a random order of the numbers below `length`; no other place is looked at.

    A Feistel network of eight rounds permutes the numbers of as many bits as `length` has, and is gone through again for what is
    not below it (cycle walking: Black and Rogaway, 2002): less than 1 us for a place, whatever the length.

    Args:
        places: ``[places]``, int64, below `length`.
        length: from 1 on, below 2 ** 62.
        seed: of the order.

    Returns:
        ``[places]``, int64.
    """
    low_bits = max(1, (length - 1).bit_length() // 2)
    high_bits = max(1, (length - 1).bit_length() - low_bits)
    keys = [np.uint64(mixed(seed, number)) for number in range(_NUM_ROUNDS)]
    found = places.astype(np.uint64)
    ahead = np.arange(len(found))
    while len(ahead):
        values, bits, rest = found[ahead], low_bits, high_bits
        for key in keys:  # the low part is hashed onto the high one, and they change places
            low = values & np.uint64((1 << bits) - 1)
            hashed = (low ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            hashed = (hashed ^ hashed >> np.uint64(29)) * np.uint64(0x94D049BB133111EB)
            high = (values >> np.uint64(bits)) ^ (hashed >> np.uint64(64 - rest))
            values = low << np.uint64(rest) | high
            bits, rest = rest, bits
        found[ahead] = values
        ahead = ahead[values >= length]
    return found.astype(np.int64)


def seed_draws(*numbers: int) -> None:
    """Generators of the host begin where these numbers say."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # the CPU alone


def random_states(processes: Processes) -> dict[str, Any]:
    """Of this process's generators: Python's, numpy's, torch's and the device's."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))  # what weights_only lets through
    numpy["state"] = {"key": key, "pos": int(numpy["state"]["pos"])}
    states = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if processes.device.type != "cpu":
        states["device"] = torch.get_device_module(processes.device).get_rng_state()
    return states


def restore_random(states: Mapping[str, Any], processes: Processes) -> None:
    """Put generators where `random_states` found them."""
    random.setstate(states["python"])
    numpy = states["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if processes.device.type != "cpu" and "device" in states:
        torch.get_device_module(processes.device).set_rng_state(states["device"])
