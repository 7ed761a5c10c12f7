"""bigmodel: load and run models larger than memory, exactly and within a budget.

    import bigmodel

    model = bigmodel.load_sharded("path/to/checkpoint", max_memory={"cpu": "8GiB"})
    model.generate(...)

The public surface is what `__all__` names; everything else is private. Names are imported when they are first used, so that
`import bigmodel` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel import errors
    from bigmodel.device_map.machine import Machine
    from bigmodel.device_map.plan import Estimate, Placement, Plan, Workload
    from bigmodel.hooks.stats import StreamStats
    from bigmodel.loading import load_sharded, make_plan
    from bigmodel.loading.lifecycle import materialize, plan_of, save, stats_of, unload

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "Machine",
    "Placement",
    "Plan",
    "StreamStats",
    "Workload",
    "errors",
    "load_sharded",
    "make_plan",
    "materialize",
    "plan_of",
    "save",
    "stats_of",
    "unload",
]

_HOMES = {
    "Estimate": "bigmodel.device_map.plan",
    "Machine": "bigmodel.device_map.machine",
    "Placement": "bigmodel.device_map.plan",
    "Plan": "bigmodel.device_map.plan",
    "StreamStats": "bigmodel.hooks.stats",
    "Workload": "bigmodel.device_map.plan",
    "load_sharded": "bigmodel.loading",
    "make_plan": "bigmodel.loading",
    "materialize": "bigmodel.loading.lifecycle",
    "plan_of": "bigmodel.loading.lifecycle",
    "save": "bigmodel.loading.lifecycle",
    "stats_of": "bigmodel.loading.lifecycle",
    "unload": "bigmodel.loading.lifecycle",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("bigmodel.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'bigmodel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
