"""What every resource needs at least for a pass of a map, in whatever order things are done."""

from __future__ import annotations

import numpy as np

from bigmodel.device_map.simulation import COMPUTATION, Outcome
from bigmodel.device_map.tables import Ints, Tables

__all__ = ["bounds"]

_PHASES = ("prefill", "decode")


def bounds(tables: Tables, maps: Ints, outcome: Outcome) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Of one map, with the rates that it was simulated with.

    Args:
        tables: what every choice takes.
        maps: [1, units] the number of each unit's choice.
        outcome: of its simulation, with what each resource works.

    Returns:
        Phase -> resource -> seconds: bytes from the disk and over links, the bytes of weights and cache that products read,
        and FLOPs, each over its rate; and resource -> bytes/s. Time that operators take by themselves is no bound.
    """
    least: dict[str, dict[str, float]] = {phase: {} for phase in _PHASES}
    for (phase, resource), busy_s in outcome.busy_s.items():
        if not resource.startswith(COMPUTATION) and busy_s[0] > 0:
            least[phase][resource] = float(busy_s[0])
    for number, phase in enumerate(_PHASES):
        for u, cost in enumerate(tables.costs.units):
            work = cost.decode if number else cost.prefill
            if work is None:
                continue
            device = tables.devices[int(tables.run[number, u, int(maps[0, u])])]
            shares = tables.machine.rates_of(device).least_shares(work, cost.weight_bytes + cost.kv_bytes)
            for part, seconds in shares.items():
                if seconds > 0:
                    resource = f"{part} of {device}"
                    least[phase][resource] = least[phase].get(resource, 0.0) + seconds
    return {phase: found for phase, found in least.items() if found}, _rates(tables, maps, least)


def _rates(tables: Tables, maps: Ints, least: dict[str, dict[str, float]]) -> dict[str, float]:
    used = {resource for found in least.values() for resource in found}
    rows = np.arange(len(tables.costs.units))
    fetch_to = tables.fetch_to[rows, maps[0]].reshape(-1, 1)
    copied = tables.copied_bytes[rows, maps[0]].reshape(-1, 1)
    copy_s = tables.copy_seconds(fetch_to, copied)
    rates = {"disk": tables.machine.disk_read_bytes_per_s}
    for d, device in enumerate(tables.devices):
        is_over = (fetch_to == d) & (copy_s > 0)
        if is_over.any():  # shared with the links that are used at the same time
            rates[f"link to {device}"] = float(copied[is_over].sum() / copy_s[is_over].sum())
        rates[f"memory of {device}"] = tables.machine.rates_of(device).best_bytes_per_s
    return {resource: rate for resource, rate in rates.items() if resource in used and np.isfinite(rate)}
